"""The replayer sees a single changed number in every kind of recording, and every file that is missing or broken."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden_files import CARRIED
from tools.golden.common import CannotReplay, Case, Checks, Folder, Recording
from tools.golden.runner import discover, main, replay

SETS = ("core", "dit", "vae")
SCRIPT = Path(__file__).parents[2] / "tools" / "replay_golden.py"
GROUPED = (
    *("param/", "grad/", "grad.", "final_first#.", "final_last#.", "final_full."),
    *("lpips/net.", "lpips/lin", "grad_true/before_start/"),
)
"""Prefixes of names behind which parameters' names stand."""


def kinds_of_tensors(path: Path) -> dict[str, str]:
    """Kind of tensor -> the first tensor of that kind: numbers and parameters' names make no difference."""
    kinds: dict[str, str] = {}
    for name in load_file(path):
        kind = re.sub(r"\d+", "#", name)
        if kind not in ("grad.x", "grad.context"):
            kind = next((prefix for prefix in GROUPED if kind.startswith(prefix)), kind)
        kinds.setdefault(kind, name)
    return kinds


def recorded_tensors() -> Iterator[Any]:
    """(case, file, tensor) for one tensor of each kind in each carried recording. Weights are only an input."""
    seen = set()
    for part in SETS:
        for case in discover(Folder(CARRIED / part)):
            for path in case.files if case.replay else ():
                if path.suffix == ".safetensors" and path.is_file() and path.name != "weights.safetensors":
                    for kind, name in kinds_of_tensors(path).items():
                        if name.startswith("world") and ":world" not in case.name:
                            continue  # what several processes gave is compared in a case of its own
                        if case.name.endswith("v1_0") and "freqs" not in name:
                            continue  # the weights of the older layout; its tables are compared
                        label = f"{part}/{case.name}:{kind}"
                        # In the default suite one kind of tensor stands for all of a case's file.
                        marks = [pytest.mark.slow] if (case.name, path) in seen else []
                        seen.add((case.name, path))
                        yield pytest.param(part, case.name, path.relative_to(CARRIED), name, id=label, marks=marks)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the carried recordings; tests leave it as they found it."""
    root = tmp_path_factory.mktemp("golden")
    for part in SETS:
        shutil.copytree(CARRIED / part, root / part)
    return root


def find(folder: Path, name: str) -> Case:
    """The case of that name."""
    return next(case for case in discover(Folder(folder)) if case.name == name)


@pytest.mark.parametrize("part, name, file, tensor", list(recorded_tensors()))
def test_one_changed_element_is_seen(copy: Path, part: str, name: str, file: Path, tensor: str) -> None:
    path = copy / file
    original, tensors = path.read_bytes(), load_file(path)
    flat = tensors[tensor].view(-1)
    middle = flat.numel() // 2
    flat[middle] += 1 + flat[middle].abs() // 100  # a recorded sum may be so large that float32 has no next number
    save_file(tensors, path)
    try:
        result = replay(find(copy / part, name))
    finally:
        path.write_bytes(original)
    assert result.is_off


NUMBERS = {
    "core/hooks/chains.json": ["cases", 0, "origin"],
    "core/hooks/arguments.json": ["eval_mode", "mlp_forward", "n_positional"],
    "core/hooks/reinit.json": ["after_reinit_none", 0, 0],
    "core/training/lr_schedules.json": ["cases", 3, "points_step_lr0_lr1", 7, 2],
    "core/training/param_groups.json": ["groups", 1, "lr"],
    "core/training/flags.json": ["add_training_args", 3, "default"],
    "core/training/ema_adam.json": ["config", "lr"],
    "vae/configs/small.json": ["checks", "decoder.up.1.upsample.conv.weight", "abs_sum"],
    "vae/losses/train_step.json": ["values", "before_start", "optimizer0", "train/loss/nll"],
    "vae/released_state_dict_keys.json": ["parameters"],
    "dit/forward/epsilon_probe/meta.json": [
        *("runs", "video", "gradient_checksums", "transformer.layers.0.mlp.dense_h_to_4h.weight", "abs_sum")
    ],
    "dit/loss/image_to_video_ofs_l2.json": ["gradient_checksums", "time_embed.0.weight", "l2"],
    "dit/samplers/image_to_video_sde_dpmpp_2m_dynamic_cfg.json": ["steps", 4, "guidance_scale"],
    "dit/schedules/guidance.json": ["dynamic", 1, "steps", 6, "scale"],
    "dit/schedules/index_sampling.json": ["entries", 5, "low_inclusive"],
    "dit/schedules/learning_rate.json": ["entries", 1, "lr", 50, 1],
    "dit/schedules/zero_snr_discretization.json": ["entries", 6, "params", "shift_scale"],
    "dit/schedules/discrete_denoiser.json": [
        "entries",
        "shift1",
        "steps_whose_nearest_index_differs_from_the_sampling_index",
    ],
}
"""File -> a number or text in it that is a recorded result, or leads to one."""


@pytest.mark.parametrize("file, place", NUMBERS.items(), ids=NUMBERS)
def test_one_changed_value_stops_the_command(copy: Path, capsys: Any, file: str, place: list[Any]) -> None:
    path = copy / file
    original = path.read_text()
    content = json.loads(original)
    node = content
    for key in place[:-1]:
        node = node[key]
    value = node[place[-1]]
    node[place[-1]] = f"not {value}" if isinstance(value, str) else value * 1.01 + 0.001
    path.write_text(json.dumps(content))
    folder = path.parents[1] if path.name == "meta.json" else path.parent
    try:
        code = main([str(folder)])
    finally:
        path.write_text(original)
    assert code == 1
    name = path.parent.name if path.name == "meta.json" else path.stem
    off = [line for line in capsys.readouterr().out.splitlines() if "  OFF  " in line]
    assert off and all(name in line for line in off)


def test_the_command_replays_what_is_carried() -> None:
    done = subprocess.run([sys.executable, SCRIPT, CARRIED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.endswith("  ok") for line in lines) >= 34
    assert lines[-1].endswith("not replayed")
    assert " 0 off, " in lines[-1]


def test_other_names_and_places_make_no_difference(copy: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(copy / "dit" / "forward" / "epsilon_probe", tmp_path / "set" / "networks" / "another")
    for suffix in (".json", ".safetensors"):
        shutil.copy(copy / "core" / "forward" / f"rotary{suffix}", tmp_path / "set" / f"turned{suffix}")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "set/networks/another/video" in printed
    assert "set/turned" in printed


def test_a_folder_without_recordings_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert main([str(tmp_path)]) == 1
    assert "is a recording that can be replayed" in capsys.readouterr().out


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path / "absent")]) == 1
    assert "is no folder" in capsys.readouterr().err


def test_an_unknown_kind_is_listed_with_a_reason(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other.json").write_text('{"something": "else"}')
    shutil.copy(CARRIED / "core" / "hooks" / "reinit.json", tmp_path)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"not replayed:\nother +no rule here knows", printed)
    assert "1 replayed, 0 off, 1 not replayed" in printed


def _pair(tmp_path: Path, name: str = "order_pre") -> tuple[Path, Path]:
    for suffix in (".json", ".safetensors"):
        shutil.copy(CARRIED / "core" / "forward" / f"{name}{suffix}", tmp_path)
    return tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors"


def _off_line(folder: Path, capsys: Any) -> str:
    assert main([str(folder)]) == 1
    return next(line for line in capsys.readouterr().out.splitlines() if "  OFF  " in line)


def test_missing_tensors_are_reported(tmp_path: Path, capsys: Any) -> None:
    _pair(tmp_path)[1].unlink()
    assert "order_pre.safetensors is missing" in _off_line(tmp_path, capsys)


def test_a_missing_description_is_reported(tmp_path: Path, capsys: Any) -> None:
    _pair(tmp_path)[0].unlink()
    assert "order_pre.json, which describes it, is missing" in _off_line(tmp_path, capsys)


def test_half_a_file_is_reported(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:5000])
    assert "order_pre.safetensors cannot be read" in _off_line(tmp_path, capsys)


def test_broken_json_is_reported(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path)[0]
    path.write_text(path.read_text()[:50])
    _pair(tmp_path, "rotary")
    assert "order_pre.json is not JSON" in _off_line(tmp_path, capsys)


def test_a_missing_tensor_is_reported(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path)[1]
    tensors = load_file(path)
    del tensors["out/full/logits"]
    save_file(tensors, path)
    assert "has no tensor 'out/full/logits'" in _off_line(tmp_path, capsys)


def test_a_missing_weight_is_reported(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path)[1]
    tensors = load_file(path)
    del tensors["param/transformer.final_layernorm.bias"]
    save_file(tensors, path)
    assert "the recorded weights do not fit" in _off_line(tmp_path, capsys)


def test_a_lost_gradient_is_reported(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path)[1]
    tensors = load_file(path)
    del tensors["grad/transformer.final_layernorm.bias"]
    save_file(tensors, path)
    assert "parameters with a gradient" in _off_line(tmp_path, capsys)


def test_weights_in_no_folder_above_are_reported(tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(CARRIED / "dit" / "loss", tmp_path / "loss")
    assert "which is in no folder above it" in _off_line(tmp_path, capsys)


def test_a_manifest_names_missing_and_changed_files(tmp_path: Path, capsys: Any) -> None:
    shutil.copy(CARRIED / "core" / "hooks" / "reinit.json", tmp_path)
    size = (tmp_path / "reinit.json").stat().st_size
    listed = {"reinit.json": {"bytes": size, "sha256": "0" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    assert "checksum of reinit.json" in _off_line(tmp_path, capsys)
    (tmp_path / "manifest.json").write_text(json.dumps({"gone.json": {"bytes": 1, "sha256": ""}}))
    assert "lists gone.json, which is missing" in _off_line(tmp_path, capsys)


def test_a_tensor_that_no_rule_uses_is_listed(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path)[1]
    save_file({**load_file(path), "out/extra": torch.zeros(1)}, path)
    assert main([str(tmp_path)]) == 0
    assert "tensors without a rule: order_pre.safetensors: out/extra" in capsys.readouterr().out


def test_an_unknown_rule_is_a_reason_and_no_failure(tmp_path: Path, capsys: Any) -> None:
    path = _pair(tmp_path, "moe_gated")[0]
    _pair(tmp_path)
    content = json.loads(path.read_text())
    content["mixins"][0]["rule"] = "all experts, in turn"
    path.write_text(json.dumps(content))
    assert main([str(tmp_path)]) == 0
    assert "the rule of mixin 'router' is not known here" in capsys.readouterr().out


def test_a_recording_without_its_configuration_is_reported(tmp_path: Path, capsys: Any) -> None:
    shutil.copy(CARRIED / "vae" / "encode_small.safetensors", tmp_path)
    assert "no configs/NAME.json whose name ends 'encode_small'" in _off_line(tmp_path, capsys)


def test_the_nearest_configuration_is_taken(copy: Path, tmp_path: Path, capsys: Any) -> None:
    for name, shift in (("one", 0), ("two", 1)):
        (tmp_path / name / "configs").mkdir(parents=True)
        shutil.copy(CARRIED / "vae" / "encode_small.safetensors", tmp_path / name)
        content = json.loads((CARRIED / "vae" / "configs" / "small.json").read_text())
        content["base_seed"] += shift
        (tmp_path / name / "configs" / "small.json").write_text(json.dumps(content))
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdict = {line.split()[0]: "OFF" in line for line in lines if "compared" in line}
    assert verdict["one/encode_small"] is False
    assert verdict["two/encode_small"] is True


# --- comparing -------------------------------------------------------------------------------------------------------


def test_what_is_not_a_number_is_off() -> None:
    checks = Checks()
    checks.close("value", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), atol=10.0)
    assert [difference.what for difference in checks.off] == ["value"]


def test_equal_infinities_are_equal() -> None:
    checks = Checks()
    checks.close("value", torch.tensor([float("inf")]), torch.tensor([float("inf")]))
    assert checks.off == []


def test_the_place_furthest_past_its_tolerance_is_shown() -> None:
    checks = Checks()
    checks.close("value", torch.tensor([100.5, 1.2]), torch.tensor([100.0, 1.0]), atol=0.0, rtol=0.01)
    assert checks.worst.difference == pytest.approx(0.2)
    assert checks.worst.tolerance == pytest.approx(0.01)


def test_another_shape_is_off() -> None:
    checks = Checks()
    checks.close("value", torch.zeros(2, 3), torch.zeros(3, 2))
    assert checks.off[0].what.startswith("shape of value")


def test_unused_tensors_are_known(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    recording = Recording(tmp_path / "x.safetensors")
    assert recording.optional("c") is None
    assert recording["a"].shape == (1,)
    assert recording.unused() == ["b"]


def test_a_reason_is_kept_beside_what_was_compared() -> None:
    def half(checks: Checks) -> None:
        checks.equal("first half", 1, 1)
        raise CannotReplay("the second half is unknown")

    result = replay(Case("half", (), half))
    assert not result.is_off
    assert result.ran
    assert result.reason == "the second half is unknown"


def test_a_case_that_compares_nothing_is_off() -> None:
    assert replay(Case("empty", (), lambda checks: None)).error == "nothing was compared"
