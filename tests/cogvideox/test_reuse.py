"""Reuse of layers between sampling steps: off is off, what is skipped is as stated, and the printed error is true."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sat.cogvideox.engine import VideoDiffusionEngine, build_engine
from sat.cogvideox.reuse import LayerReuse, Pass, in_words, speedup
from sat.diffusion.guidance import DynamicCFG, VanillaCFG
from sat.errors import ConfigError
from tests.tiny import tiny_config

SHAPE = (3, 16, 4, 4)
SEED = 7
LAYERS = 4
STEPS = 10
LORA = (
    "model.network_config.params.modules.lora_config="
    "{target: sat.model.finetune.lora2.LoraMixin, params: {r: 4, lora_alpha: 2}}",
)
SOME = 0.51
"""A threshold between the changes of the first layer: some passes are reused. The nearest change is 0.016 away."""


def build(*words: str) -> VideoDiffusionEngine:
    """A network of random weights."""
    torch.manual_seed(1)
    sizes = ("hidden_size=48", "num_attention_heads=3", f"num_layers={LAYERS}")
    config = tiny_config(*(f"model.network_config.params.{size}" for size in sizes), *words)
    engine = build_engine(config["model"]).eval()
    with torch.no_grad():
        for parameter in engine.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return engine


def sample(engine: VideoDiffusionEngine, prompts: tuple[str, ...] = ("a", "b"), **more: Any) -> Tensor:
    return engine.sample(prompts, range(len(prompts)), SEED, SHAPE, **more)


def count_layers(engine: VideoDiffusionEngine) -> list[int]:
    """The numbers of the layers that run from now on, in order."""
    ran: list[int] = []
    for number, layer in enumerate(engine.network.transformer.layers):
        layer.attention.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    return ran


def pattern(reuse: LayerReuse) -> str:
    return "".join("-" if one.is_reused else "W" for one in reuse.passes)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), LORA], ids=["plain", "lora"])
def test_at_threshold_zero_all_is_computed_and_the_samples_are_the_same_bits(words: tuple[str, ...]) -> None:
    expected = sample(build(*words))
    engine = build(*words)
    reuse = engine.reuse_layers(0.0)
    assert torch.equal(sample(engine), expected)
    assert pattern(reuse) == "W" * STEPS
    assert len(reuse.passes) == STEPS and not any(one.check_seconds for one in reuse.passes)


def test_a_huge_threshold_computes_the_first_pass_of_each_sample_and_the_checks() -> None:
    engine = build()
    reuse, ran = engine.reuse_layers(1e9), count_layers(engine)
    sample(engine)
    sample(engine)
    assert pattern(reuse) == 2 * ("W" + "-" * 9)
    checks = [1, 4, 9, 16]  # the squares up to the 18 reused passes
    assert ran.count(0) == 2 * STEPS + len(checks)
    assert [ran.count(layer) for layer in range(1, LAYERS)] == [2 + len(checks)] * (LAYERS - 1)
    numbers = [number for number, one in enumerate((one for one in reuse.passes if one.is_reused), 1) if one.error]
    assert numbers == checks


def test_a_threshold_between_the_changes_reuses_the_passes_below_it() -> None:
    engine = build()
    reuse = engine.reuse_layers(SOME)
    sample(engine)
    assert set(pattern(reuse)) == {"W", "-"} and pattern(reuse)[0] == "W"
    assert reuse.passes[0].change is None
    assert all(one.is_reused == (one.change < SOME) for one in reuse.passes[1:] if one.change is not None)


def test_a_reused_pass_is_the_first_layer_and_the_others_sum_of_the_last_whole_pass() -> None:
    """Against hidden states that hooks take from outside, for a step after a whole one."""
    engine, taken = build(), []
    transformer = engine.network.transformer
    for layer in (transformer.layers[0], transformer.layers[-1]):
        layer.register_forward_hook(lambda _, inputs, output: taken.append((inputs[0], output)))
    transformer.final_layernorm.register_forward_pre_hook(lambda _, inputs: taken.append(inputs))
    reuse = engine.reuse_layers(1e9).begin()
    inputs = torch.randn(2, 2, *SHAPE)
    cond = {"crossattn": torch.randn(2, 16, 32)}
    with torch.no_grad():
        for number in range(2):
            reuse(inputs[number], torch.tensor([900, 900 - number]), cond)
    (before, first), (_, last), _, (now_before, now_first), _, (final,) = taken[:6]
    torch.testing.assert_close(final, now_first + (last - first))
    change = ((now_first - now_before) - (first - before)).abs().sum() / (first - before).abs().sum()
    assert reuse.passes[1].change == pytest.approx(float(change), rel=1e-5)


def test_a_sample_does_not_depend_on_checks_or_on_what_was_sampled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    engine.reuse_layers(SOME)
    sample(engine, ("c", "d"))
    after = sample(engine)
    monkeypatch.setattr("sat.cogvideox.reuse.math.isqrt", lambda _: 0)
    engine = build()
    reuse = engine.reuse_layers(SOME)
    assert torch.equal(sample(engine), after)
    assert all(one.error is None for one in reuse.passes)


def test_steps_without_guidance_are_not_mixed_with_those_that_have_it() -> None:
    """Dynamic guidance starts at 1, so that the first passes have half the batch: the next one must be whole."""
    engine = build()
    engine.sampler.guider = DynamicCFG(6.0, 5, STEPS, schedule="step_index")
    reuse = engine.reuse_layers(1e9)
    sample(engine)
    batches = [one.shape[0] for one in reuse.passes]
    turn = batches.index(4)
    assert batches == [2] * turn + [4] * (STEPS - turn) and 0 < turn < STEPS - 1
    assert pattern(reuse) == "W" + "-" * (turn - 1) + "W" + "-" * (STEPS - turn - 1)


def test_inversion_does_not_reuse() -> None:
    engine = build("model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler")
    latents = torch.randn(1, *SHAPE)
    expected = engine.invert(latents, ["a"], num_iterations=1)
    engine.reuse_layers(1e9)
    sample(engine)
    assert torch.equal(engine.invert(latents, ["a"], num_iterations=1), expected)


def test_a_network_of_one_layer_has_nothing_to_reuse() -> None:
    engine = build("model.network_config.params.num_layers=1")
    reuse = engine.reuse_layers(1e9)
    sample(engine)
    assert pattern(reuse) == "W" * STEPS
    assert "0 of 10 passes" in reuse.report()


def test_guidance_in_two_passes_is_refused() -> None:
    engine = build()
    engine.sampler.guider = VanillaCFG(6.0, two_passes=True)
    with pytest.raises(ConfigError, match="two_passes=false"):
        engine.reuse_layers(0.1)


@pytest.mark.slow
def test_compiled_layers_reuse_as_plain_ones() -> None:
    torch._dynamo.reset()
    inputs = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(3))
    inputs[1] = inputs[0] + 0.1 * inputs[1]
    cond, timesteps = {"crossattn": torch.ones(2, 16, 32)}, torch.tensor([500, 500])
    outputs, patterns = [], []
    for is_compiled in (False, True):
        engine = build("model.network_config.params.num_layers=2")
        reuse = engine.reuse_layers(SOME)
        if is_compiled:
            engine.network.transformer.compile_layers(backend="eager")
        with torch.no_grad():
            outputs.append(torch.stack([reuse(one, timesteps, cond) for one in inputs]))
        patterns.append(pattern(reuse))
    assert patterns == ["W-W", "W-W"]
    torch.testing.assert_close(*outputs, rtol=0.0, atol=1e-5)
    torch._dynamo.reset()


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_networks_output(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = build(), build()
    reuse, seen = engine.reuse_layers(1e9), []
    call = LayerReuse.__call__

    def watch(self: LayerReuse, *inputs: Any, **more: Any) -> Tensor:
        output = call(self, *inputs, **more)
        seen.append((output, other.model(*inputs, **more)))  # a network that has never heard of reuse
        return output

    monkeypatch.setattr(LayerReuse, "__call__", watch)
    sample(engine)
    checked = [(one.error, *pair) for one, pair in zip(reuse.passes, seen) if one.error is not None]
    assert len(checked) == 3
    for error, output, whole in checked:
        assert error == pytest.approx(float((output - whole).norm() / whole.norm()), rel=1e-4)
        assert error > 1e-3
    errors = [error for error, _, _ in checked]
    assert f"{sum(errors) / 3:.2%} in the mean, {max(errors):.2%} at most, over 3 of" in reuse.report()
    assert "27 of 40 layer passes (68%) were skipped" in reuse.report()


def test_the_speed_counts_what_reused_passes_would_have_taken() -> None:
    small, large = (2, 3), (4, 3)
    passes = [
        Pass(small, 9.0, False, None),  # slow for another reason
        Pass(small, 0.5, True, 0.1, error=0.02, check_seconds=2.0),
        Pass(small, 0.5, True, 0.2),
        Pass(large, 4.0, False, None),
        Pass(large, 1.0, True, 0.1),
    ]
    assert speedup(passes) == pytest.approx((9.0 + 2.0 + 2.0 + 4.0 + 4.0) / (9.0 + 0.5 + 0.5 + 4.0 + 1.0))
    text = in_words(passes, 10, 0.3)
    assert "3 of 5 passes" in text and "27 of 50 layer passes (54%)" in text and "1.40 times" in text
    assert "0.1 to 0.2, median 0.1" in text and "2.00% in the mean" in text and "in 2.0 s more" in text
