"""Recordings of the mixin core: `forward/` (whole models) and `finetune/` (models with adapters)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.config import instantiate_from_config
from sat.model import BaseMixin, BaseModel, non_conflict
from sat.model.defaults import attention_fn_default, standard_attention
from sat.ops.layernorm import RMSNorm
from tools.golden.common import CannotReplay, Case, Checks, Folder, Recording, RecordingError, require, with_tensors

FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-6

CONSTRUCTOR_VALUES: dict[str, Any] = {"silu": F.silu, "relu": F.relu, "gelu_erf": F.gelu, "RMSNorm": RMSNorm}
"""Names in the `ctor` entries of recordings."""


# --- building --------------------------------------------------------------------------------------------------------


def build_model(args: Mapping[str, Any], ctor: Mapping[str, str] | None = None) -> BaseModel:
    """A BaseModel from recorded arguments and constructor keywords."""
    for name in (ctor or {}).values():
        if name not in CONSTRUCTOR_VALUES:
            raise CannotReplay(f"the constructor value '{name}' is not known here")
    options = {key: CONSTRUCTOR_VALUES[name] for key, name in (ctor or {}).items()}
    return instantiate_from_config({"target": "sat.model.BaseModel", "params": {"args": dict(args), **options}})


class RouterMixin(BaseMixin):
    """Sends each token to its k most likely experts."""

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int, top_k: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(hidden_size, num_experts, bias=False) for _ in range(num_layers))
        self.top_k = top_k

    def routing_forward(self, hidden_states: Tensor, *, layer_id: int) -> tuple[Tensor, Tensor]:
        scores = self.gates[int(layer_id)](hidden_states.flatten(0, 1)).softmax(dim=-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), chosen


class TapMixin(BaseMixin):
    """Emits a value for each layer, and hands another on to the next layer."""

    @non_conflict
    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor,
        *,
        old_impl: Any,
        output_this_layer: dict[str, Any],
        output_cross_layer: dict[str, Any],
        carry: Any = 0.0,
    ) -> Tensor:
        result = old_impl(hidden_states, mask)
        output_this_layer["mean"] = result.mean(dim=-1)
        output_cross_layer["carry"] = carry + result.sum()
        return result + 0.01 * carry


ROUTER_RULE = re.compile(
    r"softmax over experts of gate\(x\); keep the top (\d+); renormalise the kept weights to sum 1; .*"
)
TAP_RULE = re.compile(r"r = default\(h\);.*\"mean\" = mean of r.*\"carry\" = .*\+ sum\(r\); returns r \+ 0\.01 \* .*")


def add_recorded_mixins(model: BaseModel, args: Mapping[str, Any], mixins: Iterable[Mapping[str, str]]) -> None:
    """Add the mixins that a recording describes in words."""
    for mixin in mixins:
        rule = mixin.get("rule", "")
        if match := ROUTER_RULE.fullmatch(rule):
            sizes = (args["num_layers"], args["num_experts"], args["hidden_size"])
            model.add_mixin(mixin["name"], RouterMixin(*sizes, top_k=int(match[1])))
        elif TAP_RULE.fullmatch(rule):
            model.add_mixin(mixin["name"], TapMixin())
        else:
            raise CannotReplay(f"the rule of mixin '{mixin['name']}' is not known here: {rule or mixin}")


def load_parameters(model: nn.Module, recording: Recording, prefix: str = "param/") -> None:
    """Load the recorded state dict, strictly."""
    try:
        model.load_state_dict(recording.group(prefix), strict=True)
    except RuntimeError as error:
        raise RecordingError(f"the recorded weights do not fit: {error}") from error


def compare_gradients(checks: Checks, model: nn.Module, recording: Recording, prefix: str = "grad/") -> None:
    """Every recorded gradient, and none beside them."""
    recorded = recording.group(prefix)
    parameters = dict(model.named_parameters())
    own = {name for name, parameter in parameters.items() if parameter.grad is not None}
    checks.equal("parameters with a gradient", sorted(own), sorted(recorded))
    for name in own & set(recorded):
        checks.close(f"grad/{name}", parameters[name].grad, recorded[name], atol=GRADIENT_TOLERANCE)


# --- forward: BaseModel ----------------------------------------------------------------------------------------------


def recorded_mask(recording: Recording, kind: str) -> Tensor | int | None:
    """The mask that an output folder was recorded with."""
    if kind == "full":
        return None
    return -1 if kind == "causal" else recording[f"in/mask_{kind}"]


def replay_forward(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    require(content, ("args", "masks", "loss_mask_case"), path)
    recording = checks.open(path.with_suffix(".safetensors"))
    model = build_model(content["args"], content.get("ctor"))
    add_recorded_mixins(model, content["args"], content.get("mixins", []))
    load_parameters(model, recording)
    extra = {name: recording[f"in/{name}"] for name in content.get("forward_kwargs", [])}
    inputs = recording["in/input_ids"], recording["in/position_ids"]

    model.eval()
    for kind in content["masks"]:
        with torch.no_grad():
            logits, *layers = model(*inputs, recorded_mask(recording, kind), **extra, output_hidden_states=True)
        checks.close(f"out/{kind}/logits", logits, recording[f"out/{kind}/logits"], atol=FORWARD_TOLERANCE)
        for index, layer in enumerate(layers):
            name = f"out/{kind}/hidden_{index}"
            checks.close(name, layer["hidden_states"], recording[name], atol=FORWARD_TOLERANCE)

    model.train()
    mask = recorded_mask(recording, content["loss_mask_case"])
    loss = (model(*inputs, mask, **extra)[0] * recording["in/loss_weight"]).mean()
    loss.backward()
    checks.close("out/loss", loss, recording["out/loss"], atol=FORWARD_TOLERANCE)
    compare_gradients(checks, model, recording)


# --- forward: encoder and decoder ------------------------------------------------------------------------------------


def replay_encoder_decoder(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    halves = {
        f"{name}_config": {"target": "sat.model.BaseModel", "params": {"args": content[f"{name}_args"]}}
        for name in ("encoder", "decoder")
    }
    model = instantiate_from_config({"target": "sat.model.EncoderDecoderModel", "params": halves})
    load_parameters(model, recording)
    ids = recording["in/enc_input_ids"], recording["in/dec_input_ids"]
    given = {
        name: recording[f"in/{name}"]
        for name in ("enc_position_ids", "dec_position_ids", "enc_attention_mask", "dec_attention_mask")
        if f"in/{name}" in recording
    }
    positions = {name: value for name, value in given.items() if name.endswith("position_ids")}
    model.eval()
    for run, options in (("plain", positions), ("masked", given)):
        encoded, logits, *_ = model(*ids, **options)
        checks.close(f"out/{run}/encoder", encoded, recording[f"out/{run}/encoder"], atol=FORWARD_TOLERANCE)
        checks.close(f"out/{run}/logits", logits, recording[f"out/{run}/logits"], atol=FORWARD_TOLERANCE)
    model.train()
    (model(*ids, **given)[1] * recording["in/loss_weight"]).mean().backward()
    compare_gradients(checks, model, recording)


# --- forward: activation checkpointing -------------------------------------------------------------------------------


def checkpointing_arguments(variant: str) -> dict[str, Any]:
    """`checkpoint_activations with checkpoint_num_layers=2` and the like, as arguments."""
    if variant == "no checkpointing":
        return {}
    if not variant.startswith("checkpoint_activations"):
        raise CannotReplay(f"the variant '{variant}' is not known here")
    return {"checkpoint_activations": True, **{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", variant)}}


def replay_variants(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    for variant in content["variants"]:
        args = {**content["args"], **checkpointing_arguments(variant)}
        model = build_model(args, content.get("ctor"))
        add_recorded_mixins(model, args, content["mixins"])
        load_parameters(model, recording)
        model.train()
        logits, *layers = model(recording["in/input_ids"], recording["in/position_ids"], -1)
        checks.close(f"out/logits ({variant})", logits, recording["out/logits"], atol=FORWARD_TOLERANCE)
        for index, layer in enumerate(layers):
            expected = recording[f"out/mean_{index}"]
            checks.close(f"out/mean_{index} ({variant})", layer["mean"], expected, atol=FORWARD_TOLERANCE)
        (logits * recording["in/loss_weight"]).mean().backward()
        compare_gradients(checks, model, recording)


# --- forward: attention functions ------------------------------------------------------------------------------------


def replay_attention(path: Path, checks: Checks) -> None:
    """The name of an output says how it was made: function, key/value heads, mask, options."""
    recording = checks.open(path.with_suffix(".safetensors"))
    query, length = recording["in/q"], recording["in/q"].shape[2]
    causal = torch.ones(length, length).tril()
    for name in sorted(name for name in recording.tensors if name.startswith("out/")):
        function, *words = name.removeprefix("out/").split("_")
        attend = {"default": attention_fn_default, "standard": standard_attention}.get(function)
        if attend is None or not set(words) <= {"full", "causal", "masked", "fractional", "mq", "logw", "noscale"}:
            raise CannotReplay(f"the name '{name}' says nothing that is known here")
        key, value = ("in/k1", "in/v1") if "mq" in words else ("in/k", "in/v")
        masks = {"full": None, "causal": causal, "fractional": recording["in/fractional_mask"]}
        mask = next((masks[word] for word in words if word in masks), recording["in/mask"])
        got = attend(
            query,
            recording[key],
            recording[value],
            mask,
            log_attention_weights=recording["in/log_w"] if "logw" in words else None,
            scaling_attention_score="noscale" not in words,
        )
        checks.close(name, got, recording[name], atol=FORWARD_TOLERANCE)


# --- finetune --------------------------------------------------------------------------------------------------------


def lora_arguments(words: str, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of LoraMixin that a recording's description and weights tell."""
    ranks = {tensor.shape[0] for name, tensor in parameters.items() if ".matrix_A." in name}
    alpha = re.search(r"lora_alpha=(\d+(?:\.\d+)?)", words)
    layers = re.search(r"layer_range=\[([\d, ]+)\]", words)
    return {
        "r": ranks.pop(),
        "lora_alpha": float(alpha[1]) if alpha else 1.0,
        "layer_range": [int(number) for number in layers[1].split(",")] if layers else None,
    }


def replay_lora(path: Path, content: Mapping[str, Any], name: str, checks: Checks) -> None:
    recording = Recording(path.with_suffix(".safetensors"))
    args = {**content["base_args"], **content["cases"][name]["extra_args"]}
    model = build_model(args)
    options = lora_arguments(content["cases"][name]["mixin"], recording.group(f"{name}/param/"))
    params = {"layer_num": args["num_layers"], **options}
    lora = instantiate_from_config({"target": "sat.model.finetune.lora2.LoraMixin", "params": params})
    model.add_mixin("lora", lora, reinit=True)
    load_parameters(model, recording, f"{name}/param/")
    inputs = recording["in/input_ids"], recording["in/position_ids"]
    model.eval()
    for kind, mask in (("full", None), ("causal", -1)):
        expected = recording[f"{name}/out/{kind}"]
        checks.close(f"{name}/out/{kind}", model(*inputs, mask)[0], expected, atol=FORWARD_TOLERANCE)
    merged = recording.group(f"{name}/merged/")
    if merged:
        lora.merge_lora()
        state = model.state_dict()
        for key, expected in merged.items():
            checks.close(f"{name}/merged/{key}", state[key], expected, atol=FORWARD_TOLERANCE)
        expected = recording[f"{name}/out/merged_causal"]
        checks.close(f"{name}/out/merged_causal", model(*inputs, -1)[0], expected, atol=FORWARD_TOLERANCE)
    left_over = [key for key in recording.unused() if key.startswith(f"{name}/")]
    checks.equal("recorded tensors without a rule", left_over, [])


def find_finetune(folder: Folder) -> Iterator[Case]:
    for path, content in folder.with_keys("base_args", "cases"):
        for name, case in content["cases"].items():
            title = f"{folder.name(path)}:{name}"
            if "LoraMixin" in case["mixin"]:
                yield Case(title, with_tensors(path), partial(replay_lora, path, content, name))
            else:
                mixin = re.split(r"[ (:]", case["mixin"].removeprefix("sat.model.finetune."))[0]
                reason = f"there is no {mixin} here; LoraMixin (lora2) is the adapter"
                yield Case(title, with_tensors(path), reason=reason)


# --- all -------------------------------------------------------------------------------------------------------------


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `forward/` and `finetune/`."""
    for path, content in folder.with_keys("model", "args"):
        if content["model"] != "BaseModel":
            reason = f"there is no {content['model']} here: language and vision models are not part of this project"
            yield Case(folder.name(path), with_tensors(path), reason=reason)
        elif "variants" in content:
            yield Case(folder.name(path), with_tensors(path), partial(replay_variants, path, content))
        else:
            yield Case(folder.name(path), with_tensors(path), partial(replay_forward, path, content))
    for path, content in folder.with_keys("encoder_args", "decoder_args"):
        yield Case(folder.name(path), with_tensors(path), partial(replay_encoder_decoder, path, content))
    for path, content in folder.with_keys("note"):
        if set(content) == {"note"} and "head_dim" in content["note"]:
            yield Case(folder.name(path), with_tensors(path), partial(replay_attention, path))
    yield from find_finetune(folder)
