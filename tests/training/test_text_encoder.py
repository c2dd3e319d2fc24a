"""A text encoder that is trained with the network: saved, continued from, and started from its folder."""

import shutil
from pathlib import Path

import pytest
import torch

from sat.training.args import TrainArgs
from sat.training.checkpoint import fit_weights, load_weights
from sat.training.systems import build_system
from tests.ranks import run_ranks
from tests.tiny import only_run, records, tiny_config, train_on_rank
from tools.make_tiny_t5 import make

WEIGHT = "conditioner.embedders.0.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The smoke test with a tiny T5 that is trained."""
    folder = tmp_path_factory.mktemp("t5") / "t5"
    make(["a small blob moving left"], folder)
    target = "sgm.modules.encoders.modules.FrozenT5Embedder"
    entry = f"{{target: {target}, is_trainable: true, params: {{model_dir: {folder}, max_length: 16}}}}"
    return (
        f"model.conditioner_config.params.emb_models=[{entry}]",
        "model.network_config.params.modules.patch_embed_config.params.text_hidden_size=64",
    )


def test_a_run_that_trains_its_text_encoder_continues(options: tuple[str, ...], tmp_path: Path) -> None:
    options = (*options, "args.train_iters=4", "args.save_interval=2")
    run_ranks(train_on_rank, 1, (*options, f"args.save={tmp_path / 'runs'}"))
    whole = only_run(tmp_path / "runs")
    assert not torch.equal(load_weights(whole / "2")[WEIGHT], load_weights(whole / "4")[WEIGHT])

    broken_off = Path(shutil.copytree(whole, tmp_path / "broken-off"))
    shutil.rmtree(broken_off / "4")
    (broken_off / "latest").write_text("2")
    run_ranks(train_on_rank, 1, (*options, f"args.load={broken_off}"))
    losses = [[record["loss"] for record in records(run)] for run in (whole, broken_off)]
    assert losses[1] == losses[0]
    assert torch.equal(load_weights(broken_off)[WEIGHT], load_weights(whole)[WEIGHT])


def test_finetuning_may_start_from_a_network_alone(options: tuple[str, ...]) -> None:
    """Released files hold no text encoder: it comes from its own folder."""
    system = build_system(tiny_config(*options), TrainArgs(train_iters=1))
    weights = system.rename(dict(system.trained.state_dict()))
    assert WEIGHT in weights
    network = {name: value for name, value in weights.items() if name.startswith("model.")}
    missing = fit_weights(system.trained, [network], "file", system.describe, system.may_miss)
    assert WEIGHT in missing
    assert all(name.startswith("conditioner.") for name in missing)
