"""The tool that makes a tiny T5; what it makes is tested in tests/conditioning."""

import json
import sys
from pathlib import Path

import pytest
import sentencepiece

from tools.make_tiny_t5 import main, make, read_captions

CAPTIONS = ["a red square moving right", "a blue circle moving left"]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny_t5.py", *map(str, words)])
    main()


def test_every_word_of_the_captions_is_one_piece(tmp_path: Path) -> None:
    make(CAPTIONS, tmp_path / "t5")
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "t5" / "spiece.model"))
    for caption in CAPTIONS:
        assert pieces.encode(caption, out_type=str) == [f"\u2581{word}" for word in caption.split()]
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]


def test_the_same_captions_and_seed_make_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        make(CAPTIONS, tmp_path / name, seed=seed)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    same, other = (
        [(tmp_path / "one" / file).read_bytes() == (tmp_path / name / file).read_bytes() for file in files]
        for name in ("two", "other")
    )
    assert all(same)
    assert not all(other)


def test_a_second_run_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, out = tmp_path / "captions.txt", tmp_path / "t5"
    captions.write_text("\n".join(CAPTIONS))
    run(monkeypatch, "--captions", captions, "--out", out)
    assert capsys.readouterr().err == f"wrote {out}\n"
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    run(monkeypatch, "--captions", captions, "--out", out)
    assert capsys.readouterr().err == f"{out} is there already\n"
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_captions_come_from_a_manifest_or_a_text_file(tmp_path: Path) -> None:
    manifest, text = tmp_path / "manifest.jsonl", tmp_path / "captions.txt"
    rows = [{"video": "0.mp4", "caption": caption} for caption in [*CAPTIONS, CAPTIONS[0]]]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    text.write_text("\n\n".join([*CAPTIONS, CAPTIONS[1]]))
    assert read_captions(manifest) == read_captions(text) == CAPTIONS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.txt", "\n", "captions.txt holds no caption"),
        ("none.txt", None, "cannot read --captions .*none.txt: No such file or directory"),
        ("rows.jsonl", '{"text": "x"}', "rows.jsonl: every line must be a JSON object with a 'caption'"),
        ("rows.jsonl", "x", "rows.jsonl: every line must be a JSON object with a 'caption'"),
    ],
)
def test_files_without_captions_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        read_captions(tmp_path / name)
