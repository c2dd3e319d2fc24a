"""Recordings of the VAE's training: `losses/`. What needs a discriminator is listed as not replayed."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sat.config import instantiate_from_config
from sat.vae import VideoAutoencoder
from tools.golden.common import Case, Checks, Folder, Recording, RecordingError, with_tensors
from tools.golden.vae_networks import LOSS_TOLERANCE, build_from_recipe, compare, turn

GRADIENT_SHARE = 1e-4
"""Norm of the difference over the recorded norm."""

NO_DISCRIMINATOR = "there is no adversarial training of the VAE here yet: no discriminator, no perceptual loss"


# --- the perceptual distance -----------------------------------------------------------------------------------------


def perceptual_distance(weights: Mapping[str, Tensor], one: Tensor, other: Tensor) -> Tensor:
    """LPIPS (b) of images (b 3 h w) (Zhang et al. 2018, arXiv:1801.03924), of recorded weights. Stands in for a loss
    that this project does not have, so that the gradients that it sends into the VAE can be compared."""
    shift, scale = weights["scaling_layer.shift"], weights["scaling_layer.scale"]
    features = torch.cat([(image - shift) / scale for image in (one, other)])
    total = torch.zeros(len(one))
    for level in range(1, 6):
        features = F.max_pool2d(features, 2) if level > 1 else features
        names = (name for name in weights if re.fullmatch(rf"net\.slice{level}\.\d+\.weight", name))
        for name in sorted(names, key=lambda name: int(name.split(".")[2])):
            bias = weights[name.replace("weight", "bias")]
            features = F.relu(F.conv2d(features, weights[name], bias, padding=1))
        unit = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
        squared = (unit[: len(one)] - unit[len(one) :]).square()
        total = total + F.conv2d(squared, weights[f"lin{level - 1}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


# --- one step --------------------------------------------------------------------------------------------------------


def build_trained(vae: Mapping[str, Any]) -> VideoAutoencoder:
    """The recorded VAE; ours has the reconstruction loss in it."""
    seed = re.search(r"base_seed=(\d+)", vae["weights"])
    if seed is None:
        raise RecordingError(f"the weights '{vae['weights']}' name no base_seed")
    loss = {"target": "sat.vae.losses.ReconstructionLoss"}
    return build_from_recipe(vae["model"], vae["keys"], int(seed[1]), loss_config=loss).train()


def released_loss(
    loss: Mapping[str, Any], own: Mapping[str, Tensor], percep: Tensor, num_pixels: int, num_latents: int
) -> dict[str, Tensor]:
    """The recorded numbers, which are sums over a clip, from our losses, which are means over its values."""
    logvar = torch.tensor(loss["logvar_init"])
    rec = own["l1"].mean() + loss["perceptual_weight"] * percep
    nll = num_pixels * (rec * (-logvar).exp() + logvar)
    kl = own["kl"].mean() * num_latents
    total = nll + loss["kl_weight"] * kl
    return {
        "train/loss/rec": rec,
        "train/loss/percep": percep,
        "train/loss/nll": nll,
        "train/kl_loss": kl,
        "train/scalars/logvar": logvar,
        "train/loss/total": total,
        "loss": total,
    }


def compare_gradient(checks: Checks, name: str, got: Tensor | None, expected: Tensor) -> None:
    """A whole gradient, by the norm of what differs."""
    if got is None:
        checks.equal(f"{name} has a gradient", False, True)
        return
    difference, norm = (got - expected).double().norm(), float(expected.double().norm())
    checks.close(name, difference, 0.0, atol=GRADIENT_SHARE * norm)


def replay_step(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """Reconstruction, KL and perceptual loss of one step, and the true gradients, before the discriminator starts."""
    recording, vae = Recording(path.with_suffix(".safetensors")), build_trained(content["vae"])
    pixels, frames = turn(recording["x"]), recording["frame_index"]
    reconstruction, posterior = vae(pixels, turn(recording["noise"]))
    for name, value in (("moments", posterior.moments), ("reconstruction", reconstruction)):
        compare(checks, name, turn(value), recording[name])
    latents = instantiate_from_config({"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"})
    compare(checks, "z", turn(latents(posterior, turn(recording["noise"]))), recording["z"])

    clips = torch.arange(len(pixels))
    lpips = recording.group("lpips/")
    percep = perceptual_distance(lpips, pixels[clips, frames], reconstruction[clips, frames]).mean()
    own = vae.loss(pixels, reconstruction, posterior)  # type: ignore[misc]
    values = released_loss(content["loss"], own, percep, pixels[0].numel(), posterior.mean[0].numel())
    for phase, recorded in content["values"].items():
        for name, expected in recorded.get("optimizer0", {}).items():
            if name in values and (phase == "before_start" or name not in ("loss", "train/loss/total")):
                checks.close(f"{phase}: {name}", values[name], expected, rtol=LOSS_TOLERANCE)

    values["loss"].backward()
    parameters = dict(vae.named_parameters())
    for name, expected in recording.group("grad_true/before_start/").items():
        compare_gradient(checks, f"grad_true/before_start/{name}", parameters[name].grad, expected)
    for name, norm in content["grad_norms"]["true"]["before_start"].items():
        grad = parameters[name].grad
        checks.close(f"norm of the gradient of {name}", 0.0 if grad is None else grad.norm(), norm, rtol=GRADIENT_SHARE)


# --- all -------------------------------------------------------------------------------------------------------------


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `losses/`."""
    for path, content in folder.with_keys("vae", "loss", "values", "grad_norms"):
        title = folder.name(path)
        yield Case(f"{title}:before_start", with_tensors(path), partial(replay_step, path, content))
        yield Case(f"{title}:after_start", with_tensors(path), reason=NO_DISCRIMINATOR)
    steps = {path.with_suffix("") for path, _ in folder.with_keys("vae", "loss", "values", "grad_norms")}
    for path in folder.files:
        is_data = path.suffix in (".json", ".safetensors")
        if path.parent.name == "losses" and is_data and path.with_suffix("") not in steps:
            yield Case(folder.name(path), (path,), reason=NO_DISCRIMINATOR)
