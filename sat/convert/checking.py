"""The end of a conversion: what was written is read back, and both systems' classes run on it with random input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sat.compat.diffusers_names import DIT_POSITIONS
from sat.config import ConfigNode, instantiate_from_config
from sat.convert import descriptions
from sat.convert.models import Transformer
from sat.errors import CheckpointError
from sat.vae import Decoder3D, DiagonalGaussianRegularizer, Encoder3D, VideoAutoencoder

Check = int | Literal["auto", "all", "none"]
Prepare = Callable[[nn.Module], None]

AUTO_NUMBERS = 500_000_000
"""Weights in a network that `auto` still runs whole: four bytes each, twice."""
AUTO_LAYERS = 2
LIMIT = 1e-4
"""Of the largest output. Measured worst on the tiny forms: 2e-6."""
EPSILON = {"diffusers": 1e-5, "sat": 1e-6}
"""Of the final modulated norm: the one number in which the two transformers differ."""
GRID = (2, 2, 3)
"""Patches of the random input: frames, rows, columns."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of two outputs, and what was run."""

    what: str
    largest: float
    scale: float
    """The largest output."""

    def __str__(self) -> str:
        return f"{self.what}: largest difference {self.largest:.1e} (outputs up to {self.scale:.2g})"

    def check(self, limit: float = LIMIT) -> None:
        """Raise CheckpointError where the difference is more than rounding."""
        if not self.largest <= limit * max(self.scale, 1.0):
            raise CheckpointError(f"the two classes disagree, nothing was written: {self}")


def compare_states(written: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> str:
    """A line for people. Raises CheckpointError unless every tensor has the same name, precision and bits."""
    if set(written) != set(expected):
        names = sorted(set(written) ^ set(expected))
        raise CheckpointError(f"{what}: {len(names)} names are not as they should be, such as {names[0]}")
    for name, value in expected.items():
        if written[name].dtype != value.dtype or not torch.equal(written[name], value):
            raise CheckpointError(f"{what}: {name} is not what was to be written")
    return f"{what}: all {len(expected):,} tensors read back, bit for bit"


def num_layers_to_run(transformer: Transformer, check: Check) -> int:
    """How many layers the comparison runs; 0 for none."""
    whole = int(descriptions.network_params(transformer.section)["num_layers"])
    if check == "none":
        return 0
    if check == "auto":
        size = sum(value.numel() for value in transformer.state.values())
        return whole if size <= AUTO_NUMBERS else AUTO_LAYERS
    return whole if check == "all" else min(int(check), whole)


# --- the transformer -------------------------------------------------------------------------------------------------


def compare_transformers(transformer: Transformer, theirs: Mapping[str, Tensor], num_layers: int) -> list[Difference]:
    """Our network against CogVideoXTransformer3DModel on the state dict `theirs`, in float32 on the CPU.

    Of the layers, the first are kept; of a learned position table, the rows of a small clip. First with the epsilon of
    diffusers in our final norm, which must give the same numbers, then with our own.
    """
    expected = run_theirs(transformer.section, theirs, num_layers)
    words = f"our transformer and diffusers', {_count(num_layers, transformer.section)}, float32"
    differences = []
    for system, words_more in (("diffusers", ""), ("sat", ", each with its own epsilon in the last norm")):
        output = run_ours(transformer, num_layers, EPSILON[system])
        differences.append(difference(f"{words}{words_more}", output, expected))
    return differences


def run_theirs(
    section: ConfigNode, state: Mapping[str, Tensor], num_layers: int, prepare: Prepare = lambda network: None
) -> Tensor:
    """The output of CogVideoXTransformer3DModel's first layers on the random input, after `prepare` of the network."""
    config = {**descriptions.transformer_config(section), **_their_sizes(section), "num_layers": num_layers}
    config.pop("_class_name")
    network: nn.Module = load_diffusers().CogVideoXTransformer3DModel(**config).eval()
    network.load_state_dict(_cut(state, "transformer_blocks.", num_layers, "patch_embed.pos_embedding", _rows(section)))
    prepare(network)
    inputs = _inputs(section, _text_length(section))
    rotary = _rotary(config) if config["use_rotary_positional_embeddings"] else None
    with torch.no_grad():
        output: Tensor = network(
            inputs["x"],
            inputs["context"],
            inputs["timesteps"],
            ofs=inputs.get("ofs"),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    return output


def run_ours(
    transformer: Transformer, num_layers: int, epsilon: float, prepare: Prepare = lambda network: None
) -> Tensor:
    """The same of our network."""
    section = transformer.section
    network = _our_transformer(transformer, num_layers, _small(section), epsilon, _rows(section))
    prepare(network)
    with torch.no_grad():
        output: Tensor = network(**_inputs(section, _text_length(section)))
    return output


def _rows(section: Mapping[str, Any]) -> int:
    """Rows of a learned position table that the random input takes."""
    return _text_length(section) + GRID[0] * GRID[1] * GRID[2]


def compare_positions(transformer: Transformer) -> Difference | None:
    """The fixed positions that a SAT file stores against those that diffusers computes; None where there are none."""
    config = descriptions.transformer_config(transformer.section)
    table = transformer.state.get(DIT_POSITIONS)
    if table is None or config["use_learned_positional_embeddings"]:
        return None
    load_diffusers()
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    names = [name for name in config if name.startswith(("patch_size", "sample_")) or "interpolation" in name]
    names += ["max_text_seq_length", "temporal_compression_ratio"]
    options = {name: config[name] for name in names}
    other = CogVideoXPatchEmbed(
        embed_dim=table.shape[-1], in_channels=1, text_embed_dim=1, use_learned_positional_embeddings=False, **options
    )
    theirs: Tensor = other.pos_embedding
    largest = float((table.float() - theirs).abs().max()) if table.shape == theirs.shape else float("inf")
    return Difference("stored positions and those that diffusers computes", largest, float(theirs.abs().max()))


def _count(num_layers: int, section: Mapping[str, Any]) -> str:
    whole = descriptions.network_params(section)["num_layers"]
    return f"all {whole} layers" if num_layers == whole else f"the first {num_layers} of {whole} layers"


def _text_length(section: Mapping[str, Any]) -> int:
    return int(descriptions.network_params(section)["modules"]["pos_embed_config"]["params"]["text_length"])


def _small(section: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of a network whose stored positions are those of the random input."""
    _, rows, columns = descriptions.patch_of(section)
    rate = descriptions.network_params(section).get("time_compressed_rate", 4)
    # Stored tables count latent frames, whatever the patch.
    return {
        "num_frames": (GRID[0] - 1) * rate + 1,
        "latent_height": GRID[1] * rows,
        "latent_width": GRID[2] * columns,
    }


def _their_sizes(section: Mapping[str, Any]) -> dict[str, int]:
    sizes = _small(section)
    return {
        "sample_frames": sizes["num_frames"],
        "sample_height": sizes["latent_height"],
        "sample_width": sizes["latent_width"],
    }


def _cut(
    state: Mapping[str, Tensor], layers: str, num_layers: int, table: str | None, num_rows: int
) -> dict[str, Tensor]:
    """A state dict in float32 without the layers from `num_layers` on and the rows of a table from `num_rows` on."""
    kept = {}
    for name, value in state.items():
        number = name.partition(layers)[2].partition(".")[0]
        if number.isdigit() and int(number) >= num_layers:
            continue
        kept[name] = (value[:, :num_rows] if name == table else value).float()
    return kept


def _our_transformer(
    transformer: Transformer, num_layers: int, sizes: Mapping[str, int], epsilon: float, num_rows: int
) -> nn.Module:
    section = transformer.section
    final = dict(descriptions.network_params(section)["modules"]["final_layer_config"])
    final["params"] = {**(final.get("params") or {}), "eps": epsilon}
    modules = {"final_layer_config": final, "lora_config": None}
    node = descriptions.changed(section["network_config"], modules, num_layers=num_layers, **sizes)
    state: Mapping[str, Tensor] = transformer.state
    for layers in ("transformer.layers.", "adaLN_modulations.", "query_layernorm_list.", "key_layernorm_list."):
        state = _cut(state, layers, num_layers, DIT_POSITIONS, num_rows)
    network: nn.Module = instantiate_from_config(node).float().eval()
    if not descriptions.has_learned_positions(section):
        state = {name: value for name, value in state.items() if name != DIT_POSITIONS}  # fixed: made for its own grid
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {DIT_POSITIONS}
    return network


def _inputs(section: Mapping[str, Any], text_length: int) -> dict[str, Tensor]:
    params, patch = descriptions.network_params(section), descriptions.patch_of(section)
    frames, rows, columns = (length * side for length, side in zip(GRID, patch))
    generator = torch.Generator().manual_seed(0)
    width = params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    inputs = {
        "x": torch.randn(2, frames, params["in_channels"], rows, columns, generator=generator),
        "timesteps": torch.tensor([999, 301]),
        "context": torch.randn(2, text_length, width, generator=generator),
    }
    if params.get("ofs_embed_dim"):
        inputs["ofs"] = torch.tensor([2.0])
    return inputs


def _rotary(config: Mapping[str, Any]) -> Any:
    """Their tables for the random input's grid, at the size that they are trained for."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return get_3d_rotary_pos_embed(config["attention_head_dim"], ((0, 0), GRID[1:]), GRID[1:], GRID[0])


def load_diffusers() -> Any:
    """The library, which is needed for nothing else. Raises CheckpointError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise CheckpointError(
            "the comparison with diffusers' classes needs: pip install diffusers; or leave it out with --check none"
        ) from error
    return diffusers


# --- the VAE ---------------------------------------------------------------------------------------------------------


def compare_vaes(
    state: Mapping[str, Tensor], theirs: Mapping[str, Tensor], sizes: Mapping[str, Any], section: ConfigNode | None
) -> list[Difference]:
    """Our VAE against AutoencoderKLCogVideoX on the state dict `theirs`: encoding and decoding five random frames."""
    groups = descriptions.norm_groups(section)
    options = {**sizes, "norm_groups": groups}
    ours = VideoAutoencoder(Encoder3D(**options), Decoder3D(**options), DiagonalGaussianRegularizer()).eval()
    ours.load_state_dict({name: value.float() for name, value in state.items()})
    levels = len(sizes["ch_mult"])
    other = load_diffusers().AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        block_out_channels=tuple(round(sizes["ch"] * factor) for factor in sizes["ch_mult"]),
        layers_per_block=sizes["num_res_blocks"],
        latent_channels=sizes["z_channels"],
        norm_num_groups=groups,
    )
    other.load_state_dict({name: value.float() for name, value in theirs.items()})
    other.eval()
    generator = torch.Generator().manual_seed(0)
    side = 2 * ours.spatial_factor
    pixels = torch.rand(1, 5, 3, side, side, generator=generator) * 2 - 1
    with torch.no_grad():
        moments = ours.posterior(pixels, first_frame="parity").moments
        expected = other.encode(pixels.transpose(1, 2)).latent_dist.parameters.transpose(1, 2)
        latents = torch.randn(1, 2, sizes["z_channels"], 2, 2, generator=generator)
        decoded = ours.decode(latents, first_frame="parity")
        their_pixels = other.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
    return [
        difference("our VAE's encoder and diffusers', 5 frames, float32", moments, expected),
        difference("our VAE's decoder and diffusers', 2 latent frames, float32", decoded, their_pixels),
    ]


def difference(what: str, ours: Tensor, theirs: Tensor) -> Difference:
    """That of two outputs."""
    return Difference(what, float((ours - theirs).abs().max()), float(theirs.abs().max()))
