"""The command line of tools/convert.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.tiny import write_tree
from tests.tiny import ROOT
from tools.convert import build_parser


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/convert.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_tree_goes_to_diffusers_with_one_command_and_a_second_is_refused(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", "1.5-5B-I2V")
    words = (tree.path, tmp_path / "out", "--to", "diffusers", "--base", tree.yaml)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first == f"wrote {tmp_path / 'out'}"
    assert second.startswith(
        "transformer: a transformer in the form of CogVideoX1.5-5B-I2V of hidden_size 48, 2 layers"
    )
    assert second.endswith(" numbers, float32")
    assert "checked: our transformer and diffusers', all 2 layers, float32: largest difference " in done.stdout
    assert "holds a transformer, a VAE, a text encoder" in done.stderr
    again = run(*words)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.splitlines()[-1].endswith(
        f"error: {tmp_path / 'out'} is there already; move it away, or give another place"
    )


def test_options_are_read() -> None:
    parser = build_parser()
    options = parser.parse_args(["a", "b", "--to", "sat", "--merge-lora", "--check", "3", "--base", "x.yaml", "y.yaml"])
    assert options.merge_lora is True and options.check == 3 and options.base == [Path("x.yaml"), Path("y.yaml")]
    assert parser.parse_args(["a", "b", "--to", "sat", "--merge-lora", "base"]).merge_lora == "base"
    assert parser.parse_args(["a", "b", "--to", "comfy"]).check == "auto"


@pytest.mark.parametrize("words", [["--to", "onnx"], ["--to", "sat", "--check", "some"], []])
def test_wrong_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["a", "b", *words])
    message = capsys.readouterr().err
    assert any(text in message for text in ("invalid choice: 'onnx'", "neither a number of layers", "required: --to"))


@pytest.mark.parametrize(
    "words", [["--merge-lora", "a", "b"], ["a", "--merge-lora", "b"], ["--base", "x.yaml", "a", "b"]]
)
def test_an_option_that_took_a_place_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([*words, "--to", "sat"])
    option = next(word for word in words if word.startswith("--"))
    assert f"{option} takes the words after it: put SRC and DST first" in capsys.readouterr().err


def test_help_is_there_at_once() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("SRC", "DST", "--to", "--weights", "--merge-lora", "--nodes", "--check", "docs/conversion.md"):
        assert word in done.stdout
