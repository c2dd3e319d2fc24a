"""Finding a checkpoint to read: content compared, deletion held off, the newest whole one where `latest` names none."""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from sat.convert.places import find_places
from sat.errors import CheckpointError
from sat.training.adapters import load_lora
from sat.training.retention import unread
from sat.vae import load_vae
from sat.weights.finding import open_checkpoint
from tests.tools.test_reshard import write_run
from tests.vae.tiny import build_vae
from tests.weights.test_checkpoints import make_whole
from tools import export_vae, reshard

WEIGHTS = "mp_rank_00_model_states.pt"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def again(run: Path, step: str, *names: str) -> Path:
    """A run whose iteration is there under further names, all with their manifests."""
    for name in names:
        shutil.copytree(run / step, run / name)
    for name in (step, *names):
        make_whole(run / name)
    (run / "latest").write_text(names[-1])
    return run


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Iterations 2, 4 and 6 of a run."""
    (tmp_path / "2").mkdir()
    torch.save({"module": {"w": torch.arange(1000.0)}}, tmp_path / "2" / WEIGHTS)
    return again(tmp_path, "2", "4", "6")


def test_what_is_opened_is_held_until_it_is_read(plain: Path) -> None:
    with open_checkpoint(plain) as found:
        assert found.path == plain / "6"
        with unread(plain / "6") as is_free, unread(plain / "4") as other_is_free:
            assert not is_free and other_is_free
    with unread(plain / "6") as is_free:
        assert is_free
    with open_checkpoint(plain / "4" / WEIGHTS), unread(plain / "4") as is_free:
        assert not is_free


def test_a_run_falls_back_and_says_so(plain: Path, caplog: pytest.LogCaptureFixture, fresh_log: None) -> None:
    flip_a_bit(plain / "6" / WEIGHTS)
    with caplog.at_level(logging.WARNING), open_checkpoint(plain) as found:
        assert found.step == 4
    assert f"iteration 6 is not whole ({WEIGHTS} is damaged: its checksum is" in caplog.text
    assert "taking iteration 4" in caplog.text


def test_a_latest_that_points_nowhere(plain: Path, caplog: pytest.LogCaptureFixture, fresh_log: None) -> None:
    (plain / "latest").write_text("99")
    with caplog.at_level(logging.WARNING), open_checkpoint(plain) as found:
        assert found.step == 6
    assert "iteration 99 is not whole (there is no such folder); taking iteration 6" in caplog.text


@pytest.mark.parametrize("name", ["6", f"6/{WEIGHTS}"])
def test_what_was_named_is_refused(plain: Path, name: str) -> None:
    flip_a_bit(plain / "6" / WEIGHTS)
    with (
        pytest.raises(CheckpointError, match=rf"{name} is not whole: {WEIGHTS} is damaged"),
        open_checkpoint(plain / name),
    ):
        pass


def test_what_is_being_deleted_is_passed_over(plain: Path) -> None:
    with unread(plain / "6"), open_checkpoint(plain) as found:
        assert found.step == 4


# --- all that read ---------------------------------------------------------------------------------------------------


def transformer(folder: Path) -> Path:
    """Iterations 12 and 14 of a network with adapters."""
    run, _ = write_run(folder / "transformer", "bf16 with adapters")
    return again(run, "12", "14")


def vae(folder: Path) -> Path:
    """Iterations 12 and 14 of a VAE."""
    (folder / "vae" / "12").mkdir(parents=True)
    torch.save({"module": build_vae(seed=3).state_dict()}, folder / "vae" / "12" / WEIGHTS)
    return again(folder / "vae", "12", "14")


def convert(path: Path, out: Path) -> None:
    with ExitStack() as leases:
        place = find_places(path, leases).transformer
        assert place is not None and place.path.name == "12"


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Path], object]]] = {
    "tools/reshard.py": (transformer, lambda path, out: reshard.main([str(path), str(out)])),
    "tools/convert.py": (transformer, convert),
    "--lora": (transformer, lambda path, out: load_lora(path)),
    "tools/export_vae.py": (vae, lambda path, out: export_vae.main([str(path), str(out)])),
    "ckpt_path": (vae, lambda path, out: load_vae(build_vae(), path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_flipped_bit(
    tmp_path: Path, reader: str, capsys: pytest.CaptureFixture[str], fresh_log: None
) -> None:
    """Or takes the iteration before, where it was given the run."""
    make, read = READERS[reader]
    run = make(tmp_path)
    flip_a_bit(run / "14" / WEIGHTS)
    read(run, tmp_path / "out.pt")
    for name in ("14", f"14/{WEIGHTS}"):
        with pytest.raises((CheckpointError, SystemExit)) as caught:
            read(run / name, tmp_path / "other.pt")
        said = f"{caught.value} {capsys.readouterr().err}"
        assert f"{run / name} is not whole: {WEIGHTS} is damaged: its checksum is" in said
    assert not (tmp_path / "other.pt").exists()
