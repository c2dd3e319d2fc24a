"""Prompts from a file and from the keyboard, and the names of what is made of them."""

import io
from pathlib import Path

import pytest

from sat.cogvideox.output import file_stem
from sat.errors import ConfigError
from sat.sampling.args import SampleArgs
from sat.sampling.prompts import read_prompts, typed_prompts


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red square\n\n  two  words \r\nein Bär\n一只猫", encoding="utf-8")
    assert read_prompts(SampleArgs(input_file=str(file))) == ["a red square", "two  words", "ein Bär", "一只猫"]


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="input_file is not set; give a file of prompts, --prompt TEXT, or"):
        read_prompts(SampleArgs())
    with pytest.raises(ConfigError, match=r"cannot read args.input_file .*none.txt: No such file or directory"):
        read_prompts(SampleArgs(input_file=str(tmp_path / "none.txt")))
    with pytest.raises(ConfigError, match=r"cannot read args.input_file .*: Is a directory"):
        read_prompts(SampleArgs(input_file=str(tmp_path)))
    empty, binary = tmp_path / "empty.txt", tmp_path / "clip.mp4"
    empty.write_text("\n  \n")
    with pytest.raises(ConfigError, match=r"empty.txt holds no prompt; write one a line"):
        read_prompts(SampleArgs(input_file=str(empty)))
    binary.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(ConfigError, match=r"clip.mp4 is no UTF-8 text"):
        read_prompts(SampleArgs(input_file=str(binary)))


@pytest.mark.parametrize("end", ["\n", "\nnever read\n", ""])
def test_typing_ends_with_an_empty_line_or_the_end(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n two \n{end}"))
    assert list(typed_prompts()) == ["one", "two"]


def test_file_names() -> None:
    assert file_stem(7, "A red square, moving right!", 42) == "00007-a-red-square-moving-right-seed42"
    assert file_stem(0, "../../etc/passwd", 1) == "00000-etc-passwd-seed1"
    assert file_stem(0, "一只猫", 1) == "00000-seed1"
    long = file_stem(0, "word " * 100, 42)
    assert len(long) < 80
    assert "--" not in long
