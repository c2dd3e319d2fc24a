"""Sizes as a condition: what a batch says of them, how they become a vector, and what is refused."""

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from sat.conditioning.size import SIZE_KEYS, SizeEmbedder, sizes_of
from sat.conditioning.text import GeneralConditioner
from sat.errors import ConfigError

TEXT = {"target": "sat.conditioning.text.ByteEmbedder", "params": {"width": 4, "max_length": 3}, "ucg_rate": 0.1}


def size_entry(key: str, **more: Any) -> dict[str, Any]:
    target = "sgm.modules.encoders.modules.ConcatTimestepEmbedderND"
    return {"input_key": key, "target": target, "params": {"outdim": 6}, **more}


def conditioner(*keys: str) -> GeneralConditioner:
    return GeneralConditioner([TEXT, *map(size_entry, keys)])


def test_a_size_is_the_sinusoids_of_its_two_numbers() -> None:
    size = torch.tensor([[1024.0, 768.0], [0.0, 3.0]])
    expected = [
        get_timestep_embedding(size[:, side], 6, flip_sin_to_cos=True, downscale_freq_shift=0) for side in (0, 1)
    ]
    assert torch.equal(SizeEmbedder(6)(size), torch.cat(expected, dim=1))


def test_what_a_batch_does_not_say_is_that_of_a_whole_image() -> None:
    sizes = sizes_of({"original_size_as_tuple": torch.tensor([[96, 40], [64, 80]])}, [(32, 48)] * 2)
    assert sizes["original_size_as_tuple"].tolist() == [[96, 40], [64, 80]]
    assert sizes["crop_coords_top_left"].tolist() == [[0, 0], [0, 0]]
    assert sizes["target_size_as_tuple"].tolist() == [[32, 48], [32, 48]]
    assert all(size.dtype == torch.float32 for size in sizes.values())


def test_the_vector_follows_the_order_of_the_entries() -> None:
    sizes = sizes_of({}, [(32, 48)] * 2)
    forth, back = conditioner(*SIZE_KEYS), conditioner(*SIZE_KEYS[::-1])
    vector = forth(["a", "b"], None, sizes)["vector"]
    assert vector.shape == (2, forth.vector_width) == (2, 36)
    assert torch.equal(vector[:, :12], vector[:, 24:])
    assert torch.equal(vector, SizeEmbedder(6)(torch.cat([sizes[key] for key in SIZE_KEYS], dim=1)))
    assert torch.equal(back(["a", "b"], None, sizes)["vector"], vector.unflatten(1, (3, 12)).flip(1).flatten(1))


def test_dropping_the_text_keeps_the_sizes() -> None:
    model = conditioner(*SIZE_KEYS)
    cond = model(["a", "b"], torch.tensor([0.0, 0.5]), sizes_of({}, [(32, 48)] * 2))
    assert not cond["crossattn"][0].any() and cond["crossattn"][1].any()
    uncond = model.unconditional_like(cond)
    assert not uncond["crossattn"].any()
    assert torch.equal(uncond["vector"], cond["vector"]) and cond["vector"].any()


def test_a_model_of_text_alone_has_no_vector() -> None:
    assert set(conditioner()(["a"], None, sizes_of({}, [(8, 8)]))) == {"crossattn"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([size_entry(SIZE_KEYS[0])], "emb_models has no text encoder; give one with input_key: txt"),
        (
            [TEXT, size_entry("aesthetic_score")],
            "input_key 'aesthetic_score'; txt, original_size_as_tuple, .* supported",
        ),
        (
            [TEXT, size_entry(SIZE_KEYS[0], ucg_rate=0.1)],
            "original_size_as_tuple has ucg_rate 0.1; only text is dropped",
        ),
    ],
)
def test_wrong_entries_are_refused(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneralConditioner(entries)
