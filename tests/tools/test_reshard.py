"""Weights for another number of tensor-parallel ranks: the same bits, whatever the way."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sat.cogvideox.engine import NETWORK_PREFIX
from sat.mpu.shards import cut_state, shard_rules
from sat.training.checkpoint import load_parts, load_weights
from sat.weights.finding import find_checkpoint
from tests.cogvideox.tiny import HEADS, build, network_config
from tests.ranks import run_ranks
from tests.tiny import ROOT, only_run, train_on_rank
from tools.reshard import main

LORA = {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 with adapters": {"extra_modules": LORA},
    "SwiGLU": {"use_SwiGLU": True},
}


def write_run(folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A run directory of a network with 3 heads, and its weights."""
    network = build("5B", **KINDS[kind])
    if kind.startswith("bf16"):
        network.bfloat16()
    state = {f"{NETWORK_PREFIX}{name}": value for name, value in network.state_dict().items()}
    (folder / "12").mkdir(parents=True)
    torch.save({"module": state, "iteration": 12}, folder / "12" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("12")
    config = {"args": {"mode": "pretrain"}, "model": {"network_config": network_config("5B", **KINDS[kind])}}
    (folder / "training_config.yaml").write_text(yaml.safe_dump(config))
    (folder / "model_config.json").write_text(json.dumps({"hidden_size": 48, "model_parallel_size": 1}))
    return folder, state


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", [(2,), (3,), (2, 3)], ids=str)
def test_there_and_back_is_bit_exact(tmp_path: Path, kind: str, ways: tuple[int, ...]) -> None:
    """1 -> 2 -> 1, with 3 heads for 2 ranks; also by way of a third number."""
    source, state = write_run(tmp_path / "run", kind)
    rules = {f"{NETWORK_PREFIX}{name}": rule for name, rule in shard_rules(build("5B", **KINDS[kind])).items()}
    assert len(rules) > 10
    for tp in ways:
        out = tmp_path / f"tp{tp}"
        main([str(source), str(out), "--tp", str(tp)])
        parts = load_parts(find_checkpoint(out))
        assert len(parts) == tp
        for rank, part in enumerate(parts):
            assert_same_bits(part, cut_state(state, rules, rank, tp))
        source = out
    main([str(source), str(tmp_path / "whole.pt")])
    assert_same_bits(load_weights(tmp_path / "whole.pt"), state)


def test_the_run_is_described_anew(tmp_path: Path) -> None:
    source, _ = write_run(tmp_path / "run", "fp32")
    main([str(source), str(tmp_path / "out"), "--tp", "2"])
    assert find_checkpoint(tmp_path / "out").step == 12
    assert yaml.safe_load((tmp_path / "out" / "training_config.yaml").read_text())["args"]["model_parallel_size"] == 2
    described = json.loads((tmp_path / "out" / "model_config.json").read_text())
    assert described == {"hidden_size": 48, "model_parallel_size": 2}
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out" / "12").iterdir())]
    whole = (source / "12" / "mp_rank_00_model_states.pt").stat().st_size
    assert len(sizes) == 2 and max(sizes) < 0.9 * whole  # a part, and not the whole it was cut from


def test_what_a_run_on_two_ranks_wrote_is_put_together(tmp_path: Path) -> None:
    """Its final weights as one file start a run of one process that computes the same."""
    common = ("args.train_iters=2", "args.global_batch_size=2", "args.save_interval=2")
    run_ranks(train_on_rank, 2, (*common, "args.model_parallel_size=2", f"args.save={tmp_path / 'two'}"))
    run_ranks(train_on_rank, 1, (*common, f"args.save={tmp_path / 'one'}"))
    main([str(only_run(tmp_path / "two")), str(tmp_path / "whole.pt")])
    expected = load_weights(only_run(tmp_path / "one"))
    found = load_weights(tmp_path / "whole.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "query_key_value.bias" not in name:  # the key's bias cannot change the loss: Adam amplifies its rounding
            torch.testing.assert_close(found[name], value, rtol=0.0, atol=1e-4)


def test_copies_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SAT's own training lets norms of q and k drift apart."""
    source, _ = write_run(tmp_path / "run", "fp32")
    main([str(source), str(tmp_path / "two"), "--tp", "2"])
    file = tmp_path / "two" / "12" / "mp_rank_01_model_states.pt"
    content = torch.load(file)
    name = f"{NETWORK_PREFIX}transformer.layers.0.input_layernorm.weight"
    content["module"][name] = content["module"][name] + 1.0
    torch.save(content, file)
    main([str(tmp_path / "two"), str(tmp_path / "whole.pt")])
    assert f"1 weights are not the same on all ranks; rank 0's are taken: {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{tmp}/x.pt", "--tp", "2"], "--tp 2 does not go with .*: one file holds the weights of one rank"),
        (["{run}", "{tmp}/x", "--tp", "0"], "--tp 0 does not go with"),
        (["{run}", "{run}", "--tp", "2"], "is not empty; name a folder that is not there yet"),
        (["{run}", "{tmp}/x", "--base", "{tmp}/other.yaml"], "give the configuration that the weights were trained"),
        (["{run}", "{tmp}/x", "--base", "{tmp}/lora.yaml"], "the weights lack .* that the model splits over ranks"),
        (["{tmp}/nothing", "{tmp}/x"], "there is no checkpoint"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    run, _ = write_run(tmp_path / "run", "fp32")
    for name, changes in (("other", {"hidden_size": 96, "num_attention_heads": 6}), ("lora", {"extra_modules": LORA})):
        config = {"model": {"network_config": network_config("5B", **changes)}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as caught:
        main([word.format(run=run, tmp=tmp_path) for word in words])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run", "fp32")
    command = [sys.executable, ROOT / "tools" / "reshard.py", run, tmp_path / "out", "--tp", str(HEADS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(load_parts(find_checkpoint(tmp_path / "out"))) == HEADS
