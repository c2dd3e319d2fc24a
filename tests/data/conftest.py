"""Small sets of clips on disk."""

from pathlib import Path

import pytest

from sat.data.video import write_mp4
from tests.data.numbered import numbered_frames


@pytest.fixture
def make_set(tmp_path):
    """A function that makes a folder of numbered clips with captions, as released sets are laid out."""

    def make(num_clips: int = 4, num_frames: int = 20, fps: float = 8, name: str = "set") -> Path:
        folder = tmp_path / name
        (folder / "videos").mkdir(parents=True)
        (folder / "labels").mkdir()
        for number in range(num_clips):
            write_mp4(folder / "videos" / f"{number}.mp4", numbered_frames(num_frames), fps)
            (folder / "labels" / f"{number}.txt").write_text(f"clip number {number}\nsecond line")
        return folder

    return make
