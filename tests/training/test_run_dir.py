"""Where a run writes."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from sat.errors import ConfigError
from sat.training.run_dir import check_writable, make_run_dir
from tests.ranks import run_ranks


def make(rank: int, save: str) -> str:
    folder = str(make_run_dir(save, "name"))
    dist.barrier()
    return folder


def test_all_ranks_get_one_new_folder(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        one, other = run_ranks(make, 2, str(tmp_path / "deep" / "runs"))
        assert one == other and Path(one).is_dir()
        names.append(Path(one).name)
    assert re.fullmatch(r"name-\d\d-\d\d-\d\d-\d\d", names[0])
    assert names[1] != names[0]  # also within a minute


def test_a_folder_that_cannot_be_written_is_told_on_all_ranks(tmp_path: Path) -> None:
    """Below a file: nobody can write there, root neither."""
    (tmp_path / "file").touch()
    with pytest.raises(AssertionError) as caught:
        run_ranks(make, 2, str(tmp_path / "file" / "runs"))
    message = f"cannot write to args.save {tmp_path}/file/runs: Not a directory; give a folder that can be written"
    assert str(caught.value).count(message) == 2
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_writable(tmp_path / "file" / "runs", "args.save")


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs", "args.save")
    assert list((tmp_path / "runs").iterdir()) == []
