"""Archives of all kinds that must not be unpacked, and good ones."""

import io
import os
import shutil
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sat.errors import DownloadError
from sat.weights import archive as module
from sat.weights.archive import is_archive, list_archive, unpack

GOOD = {"transformer/latest": b"1000\n", "transformer/1000/mp_rank_00_model_states.pt": b"x" * 5000, "./vae/v.pt": b"y"}


def write_zip(
    file: Path, members: list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names given twice
        for name, data in members:
            archive.writestr(name, data)


def write_tar(file: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w:gz") -> None:
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def refused(file: Path, message: str) -> None:
    """The archive is refused, and nothing of it is left, neither in its folder nor outside."""
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(DownloadError, match=message):
        unpack(file, file.parent / "out")
    assert sorted(file.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
def test_a_good_archive_is_unpacked(tmp_path, kind):
    file = tmp_path / f"model.{kind}"
    if kind == "zip":
        write_zip(file, [("transformer/", b""), *GOOD.items()], zipfile.ZIP_DEFLATED)
        assert list_archive(file) == {name.removeprefix("./"): len(data) for name, data in GOOD.items()}
    else:
        write_tar(file, [(tarfile.TarInfo(name), data) for name, data in GOOD.items()], "w:gz" if "gz" in kind else "w")
    assert is_archive(file)
    unpack(file, tmp_path / "out")
    for name, data in GOOD.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "out"]


ESCAPES = ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "c:evil", "..\\evil", "\\\\host\\evil", "a//b", "a/./b"]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_lead_out_are_refused(tmp_path, name):
    write_zip(tmp_path / "a.zip", [("good", b"1"), (name, b"2")])
    refused(tmp_path / "a.zip", "a name that leads out of the folder; it is not unpacked")
    write_tar(tmp_path / "a.tar.gz", [(tarfile.TarInfo("good"), b"1"), (tarfile.TarInfo(name), b"2")])
    refused(tmp_path / "a.tar.gz", "a name that leads out of the folder; it is not unpacked")


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("vae")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    write_zip(tmp_path / "a.zip", [(link, b"/etc"), ("vae/3d-vae.pt", b"1")])
    refused(tmp_path / "a.zip", "holds vae, which is a link or a device")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo("vae")
        info.type, info.linkname = kind, "/etc"
        write_tar(tmp_path / "a.tar.gz", [(tarfile.TarInfo("good"), b"1"), (info, b"")])
        refused(tmp_path / "a.tar.gz", "holds vae, which is a link or a device")


@pytest.mark.parametrize("pair", [("a/b", "a/b"), ("a/b", "A/B"), ("a", "a/b"), ("a/b", "a"), ("a/b", "./a/b")])
def test_a_name_given_twice_is_refused(tmp_path, pair):
    write_zip(tmp_path / "a.zip", [(name, b"1") for name in pair])
    refused(tmp_path / "a.zip", "twice; it is not unpacked")


def test_bombs_are_refused(tmp_path):
    write_zip(tmp_path / "a.zip", [("zeros", bytes(50_000_000))], zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.zip").stat().st_size < 100_000
    refused(tmp_path / "a.zip", r"would unpack to 1 files of 50,000,000 bytes or more; no archive of weights does")
    write_tar(tmp_path / "a.tar.gz", [(tarfile.TarInfo("zeros"), bytes(50_000_000))])
    refused(tmp_path / "a.tar.gz", "would unpack to 1 files of 50,000,000 bytes or more")
    write_zip(tmp_path / "a.zip", [(f"n{n}", b"") for n in range(module.MAX_MEMBERS + 1)])
    refused(tmp_path / "a.zip", r"would unpack to 10,001 files")


def test_a_size_limit_holds_whatever_the_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    write_zip(tmp_path / "a.zip", [("a", b"x" * 600), ("b", b"x" * 600)])
    refused(tmp_path / "a.zip", "would unpack to 2 files of 1,200 bytes or more")


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    file = tmp_path / "a.zip"
    write_zip(file, [("a", b"x" * 100_000)], zipfile.ZIP_DEFLATED)
    data = file.read_bytes()
    file.write_bytes(data.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    refused(file, "is no whole archive")


def test_passwords_damage_and_halves_are_told(tmp_path):
    file = tmp_path / "a.zip"
    write_zip(file, list(GOOD.items()))
    good = file.read_bytes()
    file.write_bytes(good.replace(b"x" * 5000, b"x" * 4999 + b"z"))
    refused(file, "is no whole archive .*Bad CRC-32.*copy or download it again")
    locked = bytearray(good)
    locked[good.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(locked)
    refused(file, "is locked with a password")
    file.write_bytes(good[: len(good) // 2])
    refused(file, "is no whole archive")
    write_tar(tmp_path / "a.tar.gz", [(tarfile.TarInfo("a"), os.urandom(50_000))])
    (tmp_path / "a.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:-200])
    refused(tmp_path / "a.tar.gz", "is no whole archive")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", list(GOOD.items()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(tmp_path / "a.zip", r"has 1,000 bytes free, a\.zip unpacks to 5,006")


def test_a_torch_file_is_no_archive_to_unpack(tmp_path):
    torch.save({"module": {"a": torch.zeros(2)}}, tmp_path / "a.pt")
    assert zipfile.is_zipfile(tmp_path / "a.pt") and not is_archive(tmp_path / "a.pt")
