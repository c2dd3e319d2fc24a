"""Text encoders and the conditioner: real T5 classes from a folder in the released layout."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel

from sat.conditioning.text import (
    MAX_CUTS_REPORTED,
    ByteEmbedder,
    FrozenT5Embedder,
    GeneralConditioner,
    RememberingTextEncoder,
)
from sat.config import load_yaml
from sat.errors import CheckpointError, ConfigError
from tests.conditioning.conftest import CAPTIONS

T5 = "sgm.modules.encoders.modules.FrozenT5Embedder"
BYTES = "sat.conditioning.text.ByteEmbedder"
LENGTH = 12


@pytest.fixture(scope="module")
def embedder(t5_folder: Path) -> FrozenT5Embedder:
    return FrozenT5Embedder(str(t5_folder), max_length=LENGTH)


@pytest.fixture
def copy(t5_folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(t5_folder, tmp_path / "t5"))


def pieces(folder: Path, prompt: str) -> list[int]:
    """Token ids by sentencepiece itself, with the end token."""
    return [*sentencepiece.SentencePieceProcessor(str(folder / "spiece.model")).encode(prompt), 1]


# --- T5 --------------------------------------------------------------------------------------------------------------


def test_the_tiny_folder_has_the_released_layout(t5_folder: Path) -> None:
    assert sorted(file.name for file in t5_folder.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "spiece.model",
        "tokenizer_config.json",
    ]


@torch.no_grad()
def test_states_are_those_of_the_encoder_called_by_hand(embedder: FrozenT5Embedder, t5_folder: Path) -> None:
    """Padded with 0 to max_length, every position attended to: there is no mask."""
    states = embedder(CAPTIONS)
    assert (states.shape, states.dtype) == ((3, LENGTH, 64), torch.float32)
    encoder = T5EncoderModel.from_pretrained(t5_folder).eval()
    rows = [pieces(t5_folder, caption) for caption in CAPTIONS]
    assert all(len(row) < LENGTH for row in rows)
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    assert torch.equal(states, encoder(input_ids=ids).last_hidden_state)
    masked = encoder(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert not torch.allclose(states, masked, atol=1e-2)


@torch.no_grad()
def test_words_of_the_captions_are_pieces_and_unknown_ones_are_cut(t5_folder: Path) -> None:
    assert len(pieces(t5_folder, CAPTIONS[0])) == 6
    unseen = pieces(t5_folder, "a sitting duck")
    assert len(unseen) > 4
    assert max(unseen) < json.loads((t5_folder / "config.json").read_text())["vocab_size"]


@torch.no_grad()
def test_a_prompts_states_do_not_depend_on_its_batch(embedder: FrozenT5Embedder) -> None:
    together = embedder(CAPTIONS)
    for caption, states in zip(CAPTIONS, together):
        torch.testing.assert_close(embedder([caption])[0], states, rtol=0.0, atol=1e-6)


@torch.no_grad()
def test_long_prompts_are_cut_before_the_end_token(embedder: FrozenT5Embedder, t5_folder: Path) -> None:
    long = " ".join(CAPTIONS * 2)
    ids = torch.tensor([[*pieces(t5_folder, long)[: LENGTH - 1], 1]])
    assert torch.equal(embedder([long]), embedder.transformer(input_ids=ids).last_hidden_state)


def test_cut_prompts_are_reported_with_their_length(t5_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fitting = " ".join(["red"] * (LENGTH - 1))
    embedder = FrozenT5Embedder(str(t5_folder), max_length=LENGTH)
    with caplog.at_level(logging.WARNING, "sat"):
        embedder([*CAPTIONS, fitting, ""])
        assert not caplog.records
        for _ in range(MAX_CUTS_REPORTED + 5):
            embedder([f"{fitting} red red"])
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == f"a prompt of 14 tokens is cut to max_length 12: '{fitting} red red...'"
    assert len(messages) == MAX_CUTS_REPORTED
    assert messages[-1].endswith("; further ones are not reported")


def test_precision_is_the_files_own_or_what_is_asked_for(copy: Path) -> None:
    assert FrozenT5Embedder(str(copy), LENGTH).transformer.dtype == torch.float32
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert FrozenT5Embedder(str(copy), LENGTH, dtype=dtype).transformer.dtype == expected
    T5EncoderModel.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy / "half")
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(copy / name, copy / "half")
    states = FrozenT5Embedder(str(copy / "half"), LENGTH)(CAPTIONS)
    assert states.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'float16'; give fp32, bf16, fp16, or leave it out"):
        FrozenT5Embedder(str(copy), dtype="float16")  # type: ignore[arg-type]


def test_a_frozen_encoder_has_no_gradients_and_no_dropout(embedder: FrozenT5Embedder) -> None:
    embedder.train()
    assert not any(module.training for module in embedder.modules())
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    assert torch.equal(embedder(CAPTIONS), embedder(CAPTIONS))


# --- folders that are not whole --------------------------------------------------------------------------------------


def remove(*patterns: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return damage


def halve(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def change_tensor(new: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Replace one tensor of the first shard, or leave it out."""

    def damage(folder: Path) -> None:
        file = folder / "model-00001-of-00002.safetensors"
        weights = load_file(file)
        name = "encoder.block.0.layer.0.SelfAttention.q.weight"
        replaced = new(weights.pop(name))
        if replaced is not None:
            weights[name] = replaced
        else:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            del index["weight_map"][name]
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(weights, file, metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("spiece.model"), "lacks spiece.model; the released layout has"),
        (remove("spiece.model", "tokenizer_config.json"), "lacks spiece.model, tokenizer_config.json; the released"),
        (remove("config.json"), "lacks config.json; the released layout has"),
        (remove("*.safetensors"), r"lacks model\*.safetensors; the released layout has"),
        (remove("model-00002*"), "the T5 weights in .* cannot be read .*model-00002-of-00002.*; copy or download"),
        (halve("model-00002-of-00002.safetensors"), "the T5 weights in .* cannot be read .*; copy or download"),
        (halve("config.json"), "the T5 weights in .* cannot be read .*config.json.*; copy or download"),
        (halve("spiece.model"), "the T5 tokenizer in .* cannot be read .*; copy spiece.model and"),
        (halve("tokenizer_config.json"), "the T5 tokenizer in .* cannot be read .*; copy spiece.model and"),
        (
            change_tensor(lambda _: None),
            r"the T5 weights in .* lack 1 tensors \(encoder.block.0.layer.0.SelfAttention.q.weight\); copy or download",
        ),
        (change_tensor(lambda weight: weight[:3]), "the T5 weights in .* cannot be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        FrozenT5Embedder(str(copy), LENGTH)


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(CheckpointError, match="there is no T5 folder nowhere; set model_dir of the FrozenT5Embedder"):
        FrozenT5Embedder("nowhere")


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_have_fixed_vectors() -> None:
    embedder = ByteEmbedder(width=8, max_length=6)
    states = embedder(["ab", "ab\0", "ünder", "abcdefghij", "abcdefzzzz"])
    assert states.shape == (5, 6, 8)
    assert torch.equal(states, ByteEmbedder(width=8, max_length=6)(["ab", "ab\0", "ünder", "abcdef", "abcdef"]))
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(*embedder(["aa"])[0, :2])  # each place has its own vector
    assert not torch.equal(states, ByteEmbedder(width=8, max_length=6, seed=1)(["ab"] * 5))
    assert not list(embedder.state_dict())


# --- the conditioner -------------------------------------------------------------------------------------------------


def t5_entry(folder: Path, **more: Any) -> dict[str, Any]:
    return {"target": T5, "params": {"model_dir": str(folder), "max_length": LENGTH}, **more}


def byte_entry(width: int = 8, **more: Any) -> dict[str, Any]:
    return {"target": BYTES, "params": {"width": width, "max_length": LENGTH}, **more}


@torch.no_grad()
def test_no_prompt_is_zeros_as_released(t5_folder: Path) -> None:
    conditioner = GeneralConditioner([t5_entry(t5_folder)])
    cond = conditioner(CAPTIONS)
    assert torch.equal(cond["crossattn"], conditioner.embedders[0](CAPTIONS))
    assert torch.equal(conditioner.unconditional_like(cond)["crossattn"], torch.zeros(3, LENGTH, 64))


@torch.no_grad()
def test_no_prompt_may_be_the_empty_prompt(t5_folder: Path) -> None:
    conditioner = GeneralConditioner([t5_entry(t5_folder)], unconditional="empty_prompt")
    uncond = conditioner.unconditional_like(conditioner(CAPTIONS))["crossattn"]
    empty = conditioner.embedders[0]([""])
    assert empty.abs().max() > 0.1
    assert torch.equal(uncond, empty.expand(3, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("unconditional", ["zero", "empty_prompt"])
def test_a_sample_is_dropped_below_the_rate(t5_folder: Path, unconditional: Any) -> None:
    conditioner = GeneralConditioner([t5_entry(t5_folder, ucg_rate=0.1)], unconditional=unconditional)
    plain = conditioner(CAPTIONS)["crossattn"]
    dropped = conditioner(CAPTIONS, torch.tensor([0.0999, 0.1, 0.05], dtype=torch.float64))["crossattn"]
    empty = conditioner.unconditional_like({"crossattn": plain})["crossattn"]
    assert torch.equal(dropped, torch.stack([empty[0], plain[1], empty[2]]))


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_rates_from_never_to_always(rate: float, expected: int) -> None:
    conditioner = GeneralConditioner([byte_entry(ucg_rate=rate)])
    states = conditioner(["a", "b"], torch.tensor([0.0, 0.999]))["crossattn"]
    assert int((states == 0).flatten(1).all(dim=1).sum()) == expected


class CountedEmbedder(ByteEmbedder):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__(8, LENGTH)
        self.asked: list[list[str]] = []

    def forward(self, prompts: Sequence[str]) -> Tensor:
        self.asked.append(list(prompts))
        return super().forward(prompts)


def test_each_prompt_is_encoded_once_and_the_last_ones_are_kept() -> None:
    encoder = CountedEmbedder()
    remembering = RememberingTextEncoder(encoder, num_kept=2)
    for prompts in (["a", "b", "a"], ["b"], ["", "b"], ["a"]):
        assert torch.equal(remembering(prompts), ByteEmbedder(8, LENGTH)(prompts))
    assert encoder.asked == [["a", "b"], [""], ["a"]]  # "b" was used after "a", so "" pushed "a" out


def test_guidance_remembers_the_empty_prompt() -> None:
    conditioner = GeneralConditioner([byte_entry()], unconditional="empty_prompt")
    encoder = CountedEmbedder()
    conditioner.embedders[0] = encoder
    expected = conditioner.unconditional_like(conditioner(["a"]))["crossattn"]
    encoder.asked.clear()
    conditioner.remember_prompts()
    for _ in range(2):
        assert torch.equal(conditioner.unconditional_like(conditioner(["a"]))["crossattn"], expected)
    assert encoder.asked == [["a"], [""]]
    assert (conditioner.width, conditioner.text_length) == (8, LENGTH)


def test_several_encoders_stand_side_by_side() -> None:
    conditioner = GeneralConditioner([byte_entry(8, ucg_rate=1.0), byte_entry(4)])
    assert (conditioner.width, conditioner.text_length) == (12, LENGTH)
    states = conditioner(["a"], torch.tensor([0.5]))["crossattn"]
    assert torch.equal(states[..., :8], torch.zeros(1, LENGTH, 8))
    assert torch.equal(states[..., 8:], ByteEmbedder(4, LENGTH)(["a"]))
    assert torch.equal(conditioner.unconditional_like({"crossattn": states})["crossattn"], torch.zeros(1, LENGTH, 12))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_trainable_encoder_gets_gradients_where_it_is_not_dropped(t5_folder: Path, is_trainable: bool) -> None:
    conditioner = GeneralConditioner([t5_entry(t5_folder, is_trainable=is_trainable, ucg_rate=0.1)]).train()
    assert conditioner.is_trainable is is_trainable
    assert not any(module.training for module in conditioner.embedders[0].modules())
    states = conditioner(CAPTIONS[:2], torch.tensor([0.05, 0.5]))["crossattn"]
    assert states.requires_grad is is_trainable
    if is_trainable:
        states[0].sum().backward(retain_graph=True)
        weight = conditioner.embedders[0].transformer.encoder.block[0].layer[0].SelfAttention.q.weight
        assert weight.grad is None or not weight.grad.any()
        states[1].square().sum().backward()
        assert weight.grad.any()


@pytest.mark.parametrize(
    ("entries", "unconditional", "message"),
    [
        ([], "zero", "emb_models has no text encoder; give one with input_key: txt"),
        ([byte_entry(), byte_entry(input_key="image")], "zero", "emb_models has the input_key 'image'; txt, "),
        ([byte_entry()], "empty", "unconditional is 'empty'; give zero or empty_prompt"),
        ([byte_entry(ucg_rate=10)], "zero", "ucg_rate is 10; give a probability, 0 to 1"),
        ([byte_entry(ucg_rat=0.1)], "zero", "unknown key ucg_rat; did you mean 'ucg_rate'"),
    ],
)
def test_bad_conditioners_are_refused(entries: list[Any], unconditional: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneralConditioner(entries, unconditional)


def test_a_misspelt_key_is_shown_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("model:\n  emb_models:\n    - is_trainabel: true\n      target: x\n", encoding="utf-8")
    entries = load_yaml(file)["model"]["emb_models"]
    with pytest.raises(ConfigError, match=r"is_trainabel \(.*model.yaml line 3\); did you mean 'is_trainable'"):
        GeneralConditioner(entries)
