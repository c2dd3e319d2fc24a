"""What a worker hands over lies in shared memory and is not copied; the numbers are those of torch.stack."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sat.data import handover
from sat.data.frames import frames_to_pixels
from sat.data.loader import collate

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), dtype=np.uint8)
REST = {"counter": 0, "fps": 8.0, "num_frames": 3, "caption": "", "key": "", "replaced": "", "bad_key": ""}


class Clips(Dataset):
    """Items as SFTDataset makes them; the batch says where it lies."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": frames_to_pixels(FRAMES, (16, 32), 5), **REST}


def described(samples: list[dict[str, Any]]) -> tuple[Tensor, bool, bool]:
    """A batch, whether it is shared before it is handed over, and whether it is a sample's own memory."""
    pixels = collate(samples)["pixels"]
    return pixels, pixels.is_shared(), pixels.data_ptr() == samples[0]["pixels"].data_ptr()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_a_batch_of_a_worker_is_made_where_it_is_handed_over(batch_size: int, workers: int) -> None:
    loader = DataLoader(Clips(), batch_size=batch_size, num_workers=workers, collate_fn=described)
    expected = torch.stack([frames_to_pixels(FRAMES, (16, 32), 5)] * batch_size)
    for pixels, was_shared, is_own in loader:
        assert torch.equal(pixels, expected)
        assert was_shared == (workers > 0)
        assert is_own == (workers > 0 and batch_size == 1)


@pytest.mark.parametrize("shape", [(0, 3), (4,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_memory_in_a_worker_has_the_shape_and_type(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(handover, "get_worker_info", object)
    made = handover.empty(shape, dtype)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous() and made.is_shared()


def test_a_part_of_a_larger_tensor_is_copied_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the whole would be handed over."""
    monkeypatch.setattr(handover, "get_worker_info", object)
    whole = handover.empty((4, 3)).fill_(1.0)
    stacked = handover.stack([whole[:2]])
    assert stacked.untyped_storage().nbytes() == stacked.nbytes
    assert torch.equal(stacked, torch.ones(1, 2, 3))
