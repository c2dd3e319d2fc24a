"""Prompts to text states.

Letters: b prompts, n tokens (padded, no mask, as released), x width of the text states.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sat.conditioning.size import SIZE_KEYS
from sat.config import ConfigNode, did_you_mean, instantiate_from_config
from sat.errors import CacheError, CheckpointError, ConfigError
from sat.mpu.random import stream_generator

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_CUTS_REPORTED = 10
NUM_PROMPTS_KEPT = 64
"""Prompts whose states sampling remembers: 240 MB in fp32 for T5-XXL's 226 tokens."""
T5_CONFIG = (
    *("num_heads", "d_kv", "feed_forward_proj", "layer_norm_epsilon"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
"""What of a T5's configuration its weights' shapes do not say."""


class FrozenT5Embedder(nn.Module):
    """The encoder half of T5 v1.1 (Raffel et al. 2020; Shazeer 2020), read from a folder in the released layout.

    The folder holds the tokenizer (spiece.model, tokenizer_config.json) and the encoder (config.json, safetensors or
    bin shards), as in `t5-v1_1-xxl`. Prompts are padded to max_length and all positions are attended to.
    dtype: the files' own unless given. Raises CheckpointError for a folder that is not whole.
    """

    def __init__(
        self, model_dir: str, max_length: int = 226, dtype: Literal["fp32", "bf16", "fp16"] | None = None
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"the FrozenT5Embedder's dtype is '{dtype}'; give {', '.join(DTYPES)}, or leave it out")
        folder = check_t5_folder(Path(model_dir))
        self.max_length = max_length
        self.tokenizer = _load_tokenizer(folder)
        self._vocabulary = hashlib.blake2b((folder / "spiece.model").read_bytes(), digest_size=16).hexdigest()
        self.transformer = _load_encoder(folder, dtype)
        self.transformer.requires_grad_(False)
        self.num_cut = 0
        self.eval()

    @property
    def width(self) -> int:
        """Channels of the text states."""
        return self.transformer.config.d_model

    def identity(self) -> dict[str, Any]:
        """What decides the text states besides the weights."""
        config = self.transformer.config
        return {
            "max_length": self.max_length,
            "tokenizer": self._vocabulary,
            **{name: getattr(config, name) for name in T5_CONFIG},
        }

    def train(self, mode: bool = True) -> "FrozenT5Embedder":
        """The encoder stays in evaluation mode, also where it is trained: its dropout never runs."""
        return super().train(False)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Text states (b n x)."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.max_length)
        self._warn_of_cut(prompts, tokens["input_ids"])
        input_ids = torch.tensor(tokens["input_ids"], device=self.transformer.device)
        return self.transformer(input_ids=input_ids).last_hidden_state

    def _warn_of_cut(self, prompts: Sequence[str], input_ids: Sequence[Sequence[int]]) -> None:
        for prompt, ids in zip(prompts, input_ids):
            if self.num_cut == MAX_CUTS_REPORTED or ids[-1] == self.tokenizer.pad_token_id:
                continue
            length = len(self.tokenizer(prompt)["input_ids"])
            if length > self.max_length:
                self.num_cut += 1
                last = "; further ones are not reported" if self.num_cut == MAX_CUTS_REPORTED else ""
                log.warning(
                    "a prompt of %d tokens is cut to max_length %d: '%s...'%s",
                    length,
                    self.max_length,
                    prompt[:60],
                    last,
                )


def check_t5_folder(folder: Path) -> Path:
    """The folder, if it can hold a T5 encoder and its tokenizer; an error that names what is missing otherwise."""
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no T5 folder {folder}; "
            "set model_dir of the FrozenT5Embedder to a folder with t5-v1_1-xxl's files"
        )
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    missing = [
        name for name in ("config.json", "spiece.model", "tokenizer_config.json") if not (folder / name).is_file()
    ]
    if not weights:
        missing.append("model*.safetensors")
    if missing:
        raise CheckpointError(
            f"the T5 folder {folder} lacks {', '.join(missing)}; the released layout has the encoder's config.json and "
            "weights and the tokenizer's spiece.model and tokenizer_config.json in one folder"
        )
    return folder


def _transformers() -> Any:
    """The library, which takes seconds to import: only where T5 is used."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the T5 text encoder needs: pip install transformers sentencepiece protobuf") from error
    transformers.logging.disable_progress_bar()
    return transformers


def _load_tokenizer(folder: Path) -> Any:
    try:
        # Its constructor makes an empty vocabulary of a spiece.model without a word; this reads it.
        return _transformers().T5Tokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the T5 tokenizer in {folder} cannot be read ({_first_line(error)}); copy spiece.model and "
            "tokenizer_config.json again, and see that sentencepiece and protobuf are installed"
        ) from error


def _load_encoder(folder: Path, dtype: str | None) -> Any:
    try:
        encoder, report = _transformers().T5EncoderModel.from_pretrained(
            folder, dtype="auto" if dtype is None else DTYPES[dtype], output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the T5 weights in {folder} cannot be read ({_first_line(error)}); copy or download them again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise CheckpointError(
            f"the T5 weights in {folder} lack {len(missing)} tensors ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); copy or download them again"
        )
    return encoder


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class ByteEmbedder(nn.Module):
    """A text encoder that needs no file: each UTF-8 byte has a fixed random vector, each place another.

    It is drawn from its own stream, so it is the same in every process and run. For smoke tests.
    """

    table: Tensor
    places: Tensor

    def __init__(self, width: int, max_length: int, seed: int = 0) -> None:
        super().__init__()
        self.width = width
        self.max_length = max_length
        generator = stream_generator(seed, "byte embedder")
        self.register_buffer("table", torch.randn(257, width, generator=generator), persistent=False)
        self.register_buffer("places", torch.randn(max_length, width, generator=generator), persistent=False)

    def identity(self) -> dict[str, Any]:
        """What decides the text states besides the tables."""
        return {"max_length": self.max_length}

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Text states (b n x); bytes past max_length are cut, the rest is padded with byte number 256."""
        rows = [list(prompt.encode()[: self.max_length]) for prompt in prompts]
        ids = torch.tensor([row + [256] * (self.max_length - len(row)) for row in rows], device=self.table.device)
        return (self.table[ids] + self.places) / 2.0**0.5


class RememberingTextEncoder(nn.Module):
    """A frozen text encoder that reads each prompt once: the states of the last ones are kept (n x each)."""

    def __init__(self, encoder: Any, num_kept: int = NUM_PROMPTS_KEPT) -> None:
        super().__init__()
        self.encoder = encoder
        self.width, self.max_length = encoder.width, encoder.max_length
        self.num_kept = num_kept
        self._states: dict[str, Tensor] = {}

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Text states (b n x)."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]
        found = dict(zip(new, self.encoder(new))) if new else {}
        for prompt in dict.fromkeys(prompts):  # to the end of the queue: the last to be forgotten
            self._states[prompt] = found[prompt] if prompt in found else self._states.pop(prompt)
        states = torch.stack([self._states[prompt] for prompt in prompts])
        for prompt in list(self._states)[: -self.num_kept]:
            del self._states[prompt]
        return states


class FreedTextEncoder(nn.Module):
    """What is left of a text encoder whose captions are all in a cache: its sizes and the states of the empty prompt.

    empty: (1 n x), or None where nothing asks for them.
    """

    empty: Tensor | None

    def __init__(self, width: int, max_length: int, empty: Tensor | None) -> None:
        super().__init__()
        self.width, self.max_length = width, max_length
        self.register_buffer("empty", empty, persistent=False)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Text states (b n x) of empty prompts. Raises CacheError for any other."""
        if self.empty is None or any(prompts):
            raise CacheError(f"the text encoder was freed, and is asked for '{max(prompts)}'; set args.cache=none")
        return self.empty.expand(len(prompts), -1, -1)


class _EmbedderEntry:
    """One entry of `emb_models`: an embedder and how the conditioner uses it."""

    KEYS = ("is_trainable", "input_key", "ucg_rate", "target", "params")

    def __init__(self, config: Mapping[str, Any]) -> None:
        for key in config:
            if key not in self.KEYS:
                where = config.where(key) if isinstance(config, ConfigNode) else str(key)
                raise ConfigError(
                    f"unknown key {where}{did_you_mean(key, self.KEYS)}; an entry takes {', '.join(self.KEYS)}"
                )
        self.is_trainable = bool(config.get("is_trainable", False))
        self.input_key = str(config.get("input_key", "txt"))
        self.ucg_rate = float(config.get("ucg_rate", 0.0))
        if not 0.0 <= self.ucg_rate <= 1.0:
            raise ConfigError(f"ucg_rate is {self.ucg_rate:g}; give a probability, 0 to 1")
        self.embedder: nn.Module = instantiate_from_config(config)
        self.embedder.requires_grad_(self.is_trainable)


class GeneralConditioner(nn.Module):
    """Encodes the prompts and sizes of a batch, and what stands for "no prompt".

    emb_models: one entry for each encoder. Those with input_key txt read the prompts; the states of several are put
    side by side along the channels. Those that name a size (see SIZE_KEYS) make the vector condition, in their order.
    In training a sample's text states are replaced with probability ucg_rate by the unconditional ones: all zeros as
    released, or the states of the empty prompt with unconditional: empty_prompt (as diffusers samples).
    """

    def __init__(
        self, emb_models: Sequence[Mapping[str, Any]], unconditional: Literal["zero", "empty_prompt"] = "zero"
    ) -> None:
        super().__init__()
        if unconditional not in ("zero", "empty_prompt"):
            raise ConfigError(f"unconditional is '{unconditional}'; give zero or empty_prompt")
        entries = [_EmbedderEntry(config) for config in emb_models]
        if not any(entry.input_key == "txt" for entry in entries):
            raise ConfigError("the conditioner's emb_models has no text encoder; give one with input_key: txt")
        for entry in entries:
            if entry.input_key not in ("txt", *SIZE_KEYS):
                raise ConfigError(
                    f"emb_models has the input_key '{entry.input_key}'; txt, {', '.join(SIZE_KEYS)} are supported"
                )
            if entry.input_key != "txt" and entry.ucg_rate > 0.0:
                raise ConfigError(f"emb_models: {entry.input_key} has ucg_rate {entry.ucg_rate}; only text is dropped")
        self.embedders = nn.ModuleList(entry.embedder for entry in entries)
        self.input_keys = [entry.input_key for entry in entries]
        self.ucg_rates = [entry.ucg_rate for entry in entries]
        self.is_trainable = any(entry.is_trainable for entry in entries)
        self.unconditional = unconditional

    @property
    def width(self) -> int:
        """Channels of the text states."""
        return sum(self._widths())

    def _text_encoders(self) -> list[tuple[Any, float]]:
        """The encoders of prompts, each with its drop rate."""
        parts = zip(self.input_keys, self.embedders, self.ucg_rates)
        return [(embedder, rate) for key, embedder, rate in parts if key == "txt"]

    def _size_encoders(self) -> list[tuple[str, Any]]:
        """The encoders of sizes, each with the size that it reads."""
        return [(key, embedder) for key, embedder in zip(self.input_keys, self.embedders) if key != "txt"]

    def _widths(self) -> list[int]:
        return [embedder.width for embedder, _ in self._text_encoders()]

    @property
    def vector_width(self) -> int:
        """Numbers of the vector condition; 0 where no size is read."""
        return sum(embedder.width for _, embedder in self._size_encoders())

    @property
    def text_length(self) -> int:
        """Tokens of the text states."""
        return self._text_encoders()[0][0].max_length

    def remember_prompts(self) -> None:
        """From now on each prompt is encoded once; for encoders that are trained no further."""
        for place, key in enumerate(self.input_keys):
            if key == "txt":
                self.embedders[place] = RememberingTextEncoder(self.embedders[place])

    @torch.no_grad()
    def free_text_encoders(self) -> None:
        """Let the encoders go; from then on `forward` needs the states."""
        for place, key in enumerate(self.input_keys):
            if key == "txt":
                whole: Any = self.embedders[place]
                empty = whole([""]) if self.unconditional == "empty_prompt" else None
                self.embedders[place] = FreedTextEncoder(whole.width, whole.max_length, empty)

    def forward(
        self,
        prompts: Sequence[str],
        drop: Tensor | None = None,
        sizes: Mapping[str, Tensor] | None = None,
        states: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"crossattn": text states (b n x)}, and "vector" (b a) where an entry of emb_models reads a size.

        drop (b,): a number in [0, 1) for each sample, whose text is dropped below ucg_rate. sizes: see `sizes_of`.
        states (b n x): of the prompts, where they are known; nothing is encoded then.
        """
        encoders = self._text_encoders()
        if states is None:
            parts = [embedder(prompts) for embedder, _ in encoders]
        else:
            parts = list(states.split(self._widths(), dim=-1))
        kept = []
        for (embedder, rate), own in zip(encoders, parts):
            if drop is not None and rate > 0.0:
                is_dropped = (drop < rate).to(own.device).view(-1, 1, 1)
                own = torch.where(is_dropped, self._unconditional_states(embedder, own), own)
            kept.append(own)
        cond = {"crossattn": torch.cat(kept, dim=-1)}
        if sizes is None or not self._size_encoders():
            return cond
        device = cond["crossattn"].device
        vector = [embedder(sizes[key].to(device)) for key, embedder in self._size_encoders()]
        return {**cond, "vector": torch.cat(vector, dim=-1)}

    def unconditional_like(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands for "no prompt" beside an encoded batch: the other half of guidance. Sizes stay as they are."""
        encoders, widths = self._text_encoders(), self._widths()
        parts = cond["crossattn"].split(widths, dim=-1)
        states = [self._unconditional_states(embedder, part) for (embedder, _), part in zip(encoders, parts)]
        return {**cond, "crossattn": torch.cat(states, dim=-1)}

    def _unconditional_states(self, embedder: nn.Module, states: Tensor) -> Tensor:
        if self.unconditional == "zero":
            return torch.zeros_like(states)
        return embedder([""]).expand_as(states)
