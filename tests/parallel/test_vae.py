"""The VAE on processes that share a clip against one process: outputs, loss, and the gradient of every weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sat.errors import LayoutError
from sat.mpu.state import ParallelState
from sat.vae import DecodePlan, VideoAutoencoder, norms, shard, sharing
from sat.vae.causal_conv import FirstFrame
from tests.parallel.layouts import gradients, mean_over_replicas, parallel_state, worst_difference
from tests.ranks import run_ranks
from tests.vae.tiny import build_vae, make_latents, make_pixels
from tools.golden.vae_networks import build_engine

NUM_FRAMES = (1, 5, 9, 13, 17, 33)
WORLDS = (2, 3, 4)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of the largest expected value. Measured worst: 2e-14 and 8e-6."""


def pair(parallel: ParallelState, dtype: torch.dtype, **changes: Any) -> tuple[VideoAutoencoder, VideoAutoencoder]:
    """A VAE that is alone, and the same one shared."""
    alone, shared = (build_vae(**changes).to(dtype) for _ in range(2))
    shared.parallel = parallel
    return alone, shared


def differ(own: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry; NaN is infinite."""
    return worst_difference(own.detach()[None], expected.detach()[None]) if own.isfinite().all() else float("inf")


# --- a training step -------------------------------------------------------------------------------------------------


def train(vae: VideoAutoencoder, pixels: Tensor) -> dict[str, Tensor]:
    """What a step computes, and its gradients; the loss weighs every value of pixels and moments differently."""
    generator = torch.Generator().manual_seed(5)
    vae.zero_grad()
    pixels = pixels.clone().requires_grad_()
    noise = torch.randn(len(pixels), *vae.latent_shape(pixels.shape[1:]), generator=generator).to(pixels)
    reconstruction, posterior = vae(pixels, noise)
    loss = sum(
        (values - torch.randn(values.shape, generator=generator).to(values)).square().mean()
        for values in (reconstruction, posterior.moments)
    )
    loss.backward()
    found = {"reconstruction": reconstruction, "moments": posterior.moments, "loss": loss, "pixels": pixels.grad}
    return {**found, **gradients(vae)}


def compare_step(
    rank: int, num_frames: int, size: tuple[int, int, int], dtype: torch.dtype, changes: dict[str, Any]
) -> dict[str, float]:
    """Worst differences of one process, name by name."""
    parallel = ParallelState.build(cp=dist.get_world_size())
    alone, shared = pair(parallel, dtype, **changes)
    batch, height, width = size
    pixels = make_pixels(num_frames, height, width, batch=batch).to(dtype)
    expected, found = train(alone, pixels), train(shared, pixels)
    for name, parameter in shared.named_parameters():
        assert parameter.grad is not None, name
        found[name] = mean_over_replicas(found[name], parallel)
    return {name: differ(found[name], expected[name]) for name in expected}


def check(results: list[dict[str, float]], tolerance: float) -> None:
    found = {name: max(result[name] for result in results) for name in results[0]}
    worst = max(found, key=found.__getitem__)
    assert found[worst] < tolerance, f"{worst}: {found[worst]:.1e}"


def step_cases() -> list[Any]:
    """Every length on every number of processes; a few that differ in kind by default, the rest slow."""
    quick = {(2, 9), (3, 5), (4, 17), (4, 1)}  # shares of 1 and 2 latents, of none, of 5 on 4, an image
    return [
        pytest.param(world, num_frames, marks=() if (world, num_frames) in quick else pytest.mark.slow)
        for world in WORLDS
        for num_frames in NUM_FRAMES
    ]


@pytest.mark.parametrize(("world", "num_frames"), step_cases())
def test_a_step_is_that_of_one_process(world: int, num_frames: int) -> None:
    check(run_ranks(compare_step, world, num_frames, (1, 16, 16), torch.float64, {}), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", NUM_FRAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_step_in_single_precision(world: int, num_frames: int) -> None:
    check(run_ranks(compare_step, world, num_frames, (2, 16, 24), torch.float32, {}), 1e-5)


FORMS: dict[str, dict[str, Any]] = {
    "add_conv": {"decoder": {"add_conv": True}},
    "long kernel": {"time_kernel": 5},  # looks back further than a share of one latent reaches
    "images": {"time_kernel": 1},
    "no convolution in resamplers": {"resamp_with_conv": False},
    "halved once": {"ch_mult": (1, 2), "temporal_compress_times": 2},
    "never halved": {"ch_mult": (1, 2), "temporal_compress_times": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_every_form(changes: dict[str, Any], world: int) -> None:
    check(run_ranks(compare_step, world, 13, (2, 24, 16), torch.float64, changes), 1e-10)


# --- without gradients -----------------------------------------------------------------------------------------------

RULES: tuple[FirstFrame, ...] = ("split", "nosplit", "parity")
PLANS: dict[str, tuple[str | DecodePlan, int]] = {
    "one chunk": ("v1", 3),
    "an image": ("v1", 1),
    "as many chunks as two processes": ("v1", 5),
    "more chunks than processes": ("v1", 13),
    "shipped": ("main_shipped", 8),
    "intended": ("main_intended", 8),
    "a first chunk of one latent": (DecodePlan((1, 2, 3), split_first=True), 6),
    "nothing apart": (DecodePlan((1, 2, 2), split_first=False), 5),
}
"""Plan and number of latents."""


@torch.no_grad()
def compare_inference(rank: int, dtype: torch.dtype) -> dict[str, float]:
    """Worst differences of one process: encoding and decoding in one go and in chunks."""
    from sat.vae import causal_conv

    causal_conv.SLICE_NUMEL = 2000  # so that there are several slices
    alone, shared = pair(ParallelState.build(cp=dist.get_world_size()), dtype)
    found = {}
    for rule in RULES:
        for num_frames in (1, 5, 13, *((6, 7, 10, 12) if rule == "parity" else (7, 8) if rule == "split" else (4, 9))):
            expected, own = (
                vae.posterior(make_pixels(num_frames), first_frame=rule).moments for vae in (alone, shared)
            )
            found[f"encode {num_frames} frames, {rule}"] = differ(own, expected)
        for num_latents in range(1, 8):
            expected, own = (
                vae.decode(make_latents(num_latents, batch=2), first_frame=rule) for vae in (alone, shared)
            )
            found[f"decode {num_latents} latents, {rule}"] = differ(own, expected)
    for name, (plan, num_latents) in PLANS.items():
        latents = make_latents(num_latents, batch=2)
        expected_chunks, own_chunks = (list(vae.decode_chunks(latents, plan)) for vae in (alone, shared))
        assert len(own_chunks) == len(expected_chunks)
        for index, (own, expected) in enumerate(zip(own_chunks, expected_chunks)):
            found[f"{name}: chunk {index}"] = differ(own, expected)
    for frames_per_chunk in (4, 8):
        expected, own = (
            vae.posterior(make_pixels(29), frames_per_chunk=frames_per_chunk).moments for vae in (alone, shared)
        )
        found[f"encode in chunks of {frames_per_chunk}"] = differ(own, expected)
    return found


@pytest.mark.parametrize(
    ("world", "dtype"),
    [
        (2, torch.float64),
        *(pytest.param(world, torch.float64, marks=pytest.mark.slow) for world in (3, 4)),
        *(pytest.param(world, torch.float32, marks=pytest.mark.slow) for world in WORLDS),
    ],
)
def test_encoding_and_decoding_are_those_of_one_process(world: int, dtype: torch.dtype) -> None:
    check(run_ranks(compare_inference, world, dtype), TOLERANCE[dtype])


def gradient_of_latents(vae: VideoAutoencoder, num_latents: int) -> Tensor:
    """What a loss in pixels on a frozen VAE sends to its latents, and to nothing else."""
    vae.requires_grad_(False)
    latents = make_latents(num_latents, batch=2).double().requires_grad_()
    return torch.autograd.grad(vae.decode(latents).square().mean(), latents)[0]


def compare_frozen(rank: int) -> dict[str, float]:
    """Worst differences of one process, where there are as many latents as processes and where there are fewer."""
    alone, shared = pair(ParallelState.build(cp=dist.get_world_size()), torch.float64)
    return {
        f"{count} latents": differ(gradient_of_latents(shared, count), gradient_of_latents(alone, count))
        for count in (3, 2, 1)
    }


def test_gradients_reach_latents_through_a_frozen_decoder() -> None:
    check(run_ranks(compare_frozen, 3), 1e-10)


def compare_chunks_with_gradients(rank: int) -> dict[str, float]:
    """Chunks are not shared where gradients are wanted: every process encodes them all."""
    parallel = ParallelState.build(cp=dist.get_world_size())
    results = []
    for vae in pair(parallel, torch.float64):
        moments = vae.posterior(make_pixels(13), frames_per_chunk=4).moments
        moments.square().mean().backward()
        results.append({"moments": moments, **gradients(vae)})
    expected, found = results
    return {name: differ(mean_over_replicas(found[name].detach(), parallel), expected[name]) for name in expected}


def test_chunks_with_gradients() -> None:
    check(run_ranks(compare_chunks_with_gradients, 2), 1e-10)


@torch.no_grad()
def compare_bf16(rank: int) -> tuple[float, float]:
    """Mean error of decoded pixels in bf16 against float32: of one process, and shared."""
    alone, shared = pair(ParallelState.build(cp=dist.get_world_size()), torch.bfloat16)
    exact = build_vae().decode(make_latents(5))
    error, shared_error = ((vae.decode(make_latents(5)).float() - exact).abs().mean() for vae in (alone, shared))
    return float(error), float(shared_error)


def test_bf16_is_as_good_as_that_of_one_process() -> None:
    for error, shared_error in run_ranks(compare_bf16, 2):
        assert shared_error < 2 * error


@torch.no_grad()
def compare_in_the_engine(rank: int) -> dict[str, float]:
    """Worst differences of one process; an engine whose VAE is built while the job's layout is set."""
    alone = build_engine(build_vae(decode_preset="main_intended"), en_and_decode_n_samples_a_time=1)
    with parallel_state(ParallelState.build(cp=dist.get_world_size())):
        shared = build_engine(build_vae(decode_preset="main_intended"), en_and_decode_n_samples_a_time=1)
    assert shared.first_stage_model.parallel.size("cp") == dist.get_world_size()
    pixels, noise, latents = make_pixels(9, batch=2), make_latents(3, batch=2), make_latents(6)
    found = {"encode": differ(shared.encode_first_stage(pixels, noise), alone.encode_first_stage(pixels, noise))}
    chunks = zip(shared.decode_first_stage(latents), alone.decode_first_stage(latents), strict=True)
    return {**found, **{f"chunk {index}": differ(own, expected) for index, (own, expected) in enumerate(chunks)}}


def test_an_engine_encodes_and_decodes_with_all_processes() -> None:
    check(run_ranks(compare_in_the_engine, 2), 1e-5)


def refuse(rank: int) -> str:
    _, shared = pair(ParallelState.build(cp=2), torch.float32)
    with pytest.raises(LayoutError) as refusal:
        shared.encode(make_pixels(5, height=16 + 8 * rank))
    return str(refusal.value)


def test_different_clips_are_refused_on_every_process() -> None:
    for message in run_ranks(refuse, 2):
        assert message == (
            "pixels differ among the 2 processes that share a clip: (1, 5, 3, 16, 24) at place 0, (1, 5, 3, 24, 24) at "
            "place 1; give all of them the same"
        )


# --- the comparisons have teeth --------------------------------------------------------------------------------------


def norms_see_their_own_frames() -> None:
    original = norms.group_statistics
    norms.group_statistics = lambda norm, hidden, shard=None: original(norm, hidden)


def gradients_of_statistics_stay_here() -> None:
    shard.FrameShard.sum = lambda self, values: values  # type: ignore[method-assign]


def copies_stand_before_every_share() -> None:
    shard.FrameShard.neighbours = property(lambda self: (None, None))  # type: ignore[assignment, method-assign]


def gradients_of_frames_handed_on_are_dropped() -> None:
    original = shard._PassOn.backward

    def drop(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, *rest = original(ctx, grad)
        assert own is not None
        return torch.zeros_like(own), *rest

    shard._PassOn.backward = staticmethod(drop)  # type: ignore[method-assign]


def frames_that_pass_through_are_dropped() -> None:
    """A share of one frame hands on its own twice instead of what it was handed."""
    shard._last_frames = lambda before, tail: tail[:, :, -1:].expand_as(before)


def gradients_in_shares_lack_their_factor() -> None:
    original = sharing._GatherShares.backward
    sharing._GatherShares.backward = staticmethod(  # type: ignore[method-assign]
        lambda ctx, grad: original(ctx, grad / ctx.group.size())
    )


def zeros_that_stand_in_are_counted() -> None:
    shard.FrameShard.has_frames = property(lambda self: True)  # type: ignore[assignment, method-assign]


MUTATIONS: tuple[tuple[Callable[[], None], int], ...] = (
    (norms_see_their_own_frames, 9),
    (gradients_of_statistics_stay_here, 9),
    (copies_stand_before_every_share, 9),
    (gradients_of_frames_handed_on_are_dropped, 9),
    (frames_that_pass_through_are_dropped, 9),
    (gradients_in_shares_lack_their_factor, 9),
    (zeros_that_stand_in_are_counted, 5),
)
"""What is left out, and frames of a clip that shows it."""


def compare_mutated(rank: int, mutate: Callable[[], None], num_frames: int) -> float:
    """Worst difference of a step in a process whose code was changed."""
    mutate()
    return max(compare_step(rank, num_frames, (1, 16, 16), torch.float64, {}).values())


@pytest.mark.slow
@pytest.mark.parametrize(("mutate", "num_frames"), MUTATIONS, ids=lambda value: getattr(value, "__name__", None))
def test_a_mutation_is_noticed(mutate: Callable[[], None], num_frames: int) -> None:
    assert max(run_ranks(compare_mutated, 3, mutate, num_frames)) > 1e-3
