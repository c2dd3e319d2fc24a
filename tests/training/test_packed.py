"""Training on packed rows and on buckets: the same losses at any layout, and as with each clip alone."""

from pathlib import Path

import pytest
import torch

from sat.errors import ConfigError, DataError
from sat.training.checkpoint import load_weights
from tests.parallel.layouts import LAYOUTS, Layout
from tests.ranks import run_ranks
from tests.tiny import FORMS, only_run, records, train_on_rank

STEPS = 4
MIXED = "data.params.sizes=[[1, 4, 4], [3, 4, 4], [3, 2, 6], [5, 4, 2], [2, 6, 6]]"
COMMON = (
    f"args.train_iters={STEPS}",
    f"args.save_interval={STEPS}",
    "args.global_batch_size=4",
    "model.network_config.params.hidden_size=48",
    "model.network_config.params.num_attention_heads=3",
    MIXED,
)
PACK = "data.params.pack={max_tokens: 70}"
LOSS_RTOL = 1e-5


def train(folder: Path, layout: Layout, *words: str, stage: int = 1, micro: int = 1) -> Path:
    options = (
        *COMMON,
        f"args.save={folder}",
        f"deepspeed.train_micro_batch_size_per_gpu={micro}",
        f"deepspeed.zero_optimization.stage={stage}",
        f"args.model_parallel_size={layout.tp}",
        f"args.context_parallel_size={layout.cp}",
        f"args.context_parallel_mode={layout.mode}",
        f"args.sequence_parallel={str(layout.sp).lower()}",
        *words,
    )
    run_ranks(train_on_rank, layout.world, options)
    return only_run(folder)


def numbers(run: Path, key: str = "loss") -> torch.Tensor:
    return torch.tensor([record[key] for record in records(run)])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("packed"), Layout(), PACK)


def assert_equal(run: Path, reference: Path) -> None:
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(numbers(run, key), numbers(reference, key), rtol=LOSS_RTOL, atol=0.0)
    assert numbers(run, "samples").tolist() == numbers(reference, "samples").tolist()
    assert numbers(run, "tokens").tolist() == numbers(reference, "tokens").tolist()


@pytest.mark.parametrize("micro", [2, 4])
def test_rows_that_share_a_pass_change_nothing(reference: Path, tmp_path: Path, micro: int) -> None:
    assert_equal(train(tmp_path, Layout(), PACK, micro=micro), reference)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("DP2", 2),
        ("TP2", 1),
        ("TP2+SP", 1),
        ("Ulysses2", 1),
        ("Ring2", 3),
        pytest.param("Ring3", 1, marks=pytest.mark.slow),
        pytest.param("TP2+SPxRing2", 3, marks=pytest.mark.slow),
        pytest.param("Ulysses2xRing2", 2, marks=pytest.mark.slow),
        pytest.param("DP2xCP2", 3, marks=pytest.mark.slow),
    ],
)
def test_every_layout(reference: Path, tmp_path: Path, name: str, stage: int) -> None:
    assert_equal(train(tmp_path, LAYOUTS[name], PACK, stage=stage), reference)


@pytest.mark.parametrize(
    "words",
    [
        ("args.checkpoint_activations=true",),
        (
            "model.network_config.params.modules.lora_config="
            "{target: sat.model.finetune.lora2.LoraMixin, params: {r: 4}}",
        ),
    ],
    ids=["recomputed", "lora"],
)
def test_switches_that_change_no_first_loss(reference: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    run = train(tmp_path, Layout(), PACK, *words)
    torch.testing.assert_close(numbers(run)[:1], numbers(reference)[:1], rtol=LOSS_RTOL, atol=0.0)


@pytest.mark.parametrize(
    ("activations", "name", "stage"),
    [
        ("keep_attention", "DP2", 2),
        pytest.param("recompute", "DP2", 3, marks=pytest.mark.slow),
        pytest.param("offload", "TP2", 2, marks=pytest.mark.slow),
        pytest.param("recompute_every_2", "Ulysses2", 1, marks=pytest.mark.slow),
    ],
)
def test_activations_by_choice(reference: Path, tmp_path: Path, activations: str, name: str, stage: int) -> None:
    run = train(tmp_path, LAYOUTS[name], PACK, f"args.activations={activations}", stage=stage)
    assert_equal(run, reference)


def test_kept_attention_is_refused_where_weights_are_gathered_in_between(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"args.activations is keep_attention, and ZeRO 3 .* or .*stage to 2"):
        train(tmp_path, Layout(), PACK, "args.activations=keep_attention", stage=3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("DP2", 2), ("DP2", 3), ("TP2", 1), ("Ring2", 1)])
def test_compiled_layers(reference: Path, tmp_path: Path, name: str, stage: int) -> None:
    assert_equal(train(tmp_path, LAYOUTS[name], PACK, "args.compile=true", stage=stage), reference)


WITH_LORA = {
    **FORMS,
    "LoRA": (
        "model.network_config.params.modules.lora_config={target: sat.model.finetune.lora2.LoraMixin, params: {r: 4}}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", WITH_LORA)
def test_every_form_of_the_model(tmp_path: Path, form: str) -> None:
    """Split over ranks in each way: the losses and gradient norms of one process."""
    one = train(tmp_path / "one", Layout(), PACK, *WITH_LORA[form])
    for name in ("TP2", "Ulysses2", "Ring2"):
        assert_equal(train(tmp_path / name, LAYOUTS[name], PACK, *WITH_LORA[form]), one)


def test_packed_rows_train_as_single_clips_do(tmp_path: Path) -> None:
    """One row a step that holds one clip each: a plan of single clips is plain training with batches of one."""
    one = ("args.global_batch_size=1", "data.params.sizes=[[3, 4, 4]]")
    packed = train(tmp_path / "packed", Layout(), *one, "data.params.pack={max_tokens: 28}")
    plain = train(tmp_path / "plain", Layout(), *one)
    assert numbers(packed, "tokens").tolist() == numbers(plain, "tokens").tolist()
    torch.testing.assert_close(numbers(packed), numbers(plain), rtol=LOSS_RTOL, atol=0.0)


def test_the_loss_of_tokens_weighs_long_clips_more(reference: Path, tmp_path: Path) -> None:
    by_token = train(tmp_path, Layout(), PACK, "data.params.pack.loss=token")
    assert numbers(by_token, "tokens").tolist() == numbers(reference, "tokens").tolist()
    assert (numbers(by_token)[0] - numbers(reference)[0]).abs() > 1e-3


def test_buckets_train_the_same_at_two_processes(tmp_path: Path) -> None:
    bucket = "data.params.bucket={max_tokens: 70}"
    one = train(tmp_path / "one", Layout(), bucket)
    assert_equal(train(tmp_path / "two", Layout(dp=2), bucket, stage=2), one)
    assert load_weights(one)


def test_a_continued_run_goes_on_with_the_plan(reference: Path, tmp_path: Path) -> None:
    first = train(tmp_path, Layout(), PACK, "args.train_iters=2", "args.save_interval=2", "args.lr_decay_iters=4")
    options = (*COMMON, PACK, "deepspeed.train_micro_batch_size_per_gpu=1", f"args.load={first}", "args.mode=pretrain")
    run_ranks(train_on_rank, 2, options)
    torch.testing.assert_close(numbers(first), numbers(reference), rtol=LOSS_RTOL, atol=0.0)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("data.params.pack={max_tokens: 17}",), DataError, r"max_tokens 17 holds no clip: the smallest has 18 tokens"),
        (("data.params.pack={max_token: 70}",), ConfigError, r"unknown key .*max_token.*did you mean 'max_tokens'"),
        ((PACK, "data.params.bucket={max_tokens: 70}"), ConfigError, "has both pack and bucket"),
        (("data.params.pack={max_tokens: 0}",), ConfigError, "max_tokens is 0; give 1 or more"),
        (
            ("data.params.bucket={max_tokens: 70}", "deepspeed.train_micro_batch_size_per_gpu=2"),
            ConfigError,
            r"with data.params.bucket a row is a batch of its own: set it to 1, and max_tokens to 140",
        ),
    ],
)
def test_bad_plans_are_refused(tmp_path: Path, words: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(AssertionError, match=f"(?s){error.__name__}.*{message}"):
        train(tmp_path, Layout(), *words)
