"""An image as a condition: the latents of a clip's first frame, appended to the channels (CogVideoX, arXiv:2408.06072).

Letters: b samples, t c h w latent frames, channels, rows, columns; H W pixel rows and columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sat.config import warn_once
from sat.diffusion.scaling import Clips
from sat.errors import ConfigError
from sat.mpu.random import sample_normal, sample_uniform

ImageScaling = Literal["multiply", "none", "divide"]
"""What is done to the latents of an image with the model's scale factor, see `scale_image_latents`."""

IMAGE_SCALINGS: tuple[ImageScaling, ...] = get_args(ImageScaling)

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -3.0, 0.5
"""Of the noise that training puts on images, whose values lie in [-1, 1]: half of them get less than 0.05."""


def scale_image_latents(latents: Tensor, scale_factor: float, scaling: ImageScaling) -> Tensor:
    """Latents of an image, as the VAE gives them, at the strength at which a network takes them.

    `multiply`: times scale_factor, as every clip's latents; release 1.0 and its diffusers form. `none`: SAT's sampling
    of 1.5. `divide`: by scale_factor, which diffusers does with 1.5 (`invert_scale_latents`). A network must be sampled
    with the rule that it was trained with.
    """
    if scaling == "none":
        return latents
    return latents * scale_factor if scaling == "multiply" else latents / scale_factor


def released_image_scaling(patch_frames: int) -> ImageScaling:
    """The rule that goes with the released weights: of 1.5, whose patches span two latent frames, or of 1.0."""
    return "none" if patch_frames > 1 else "multiply"


def add_image_noise(images: Tensor, log_sigmas: Tensor, noise: Tensor) -> Tensor:
    """Images (b 1 3 H W) with noise of strength exp(N(-3, 0.5²)), one for each: log_sigmas (b,) and noise standard
    normal."""
    sigmas = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * log_sigmas).exp().to(images)
    return images + sigmas.view(-1, 1, 1, 1, 1) * noise.to(images)


def spread_over_clip(image_latents: Tensor, num_frames: int, everywhere: bool = False) -> Tensor:
    """The condition of a clip (t c h w), of its image's latents (1 c h w): at the first frame that the network sees,
    zeros at all others; or the same everywhere."""
    if everywhere:
        return image_latents.expand(num_frames, -1, -1, -1)
    others = image_latents.new_zeros(num_frames - 1, *image_latents.shape[1:])
    return torch.cat([image_latents, others])


@dataclass(frozen=True)
class ImageConditioner:
    """How a network that continues images is told of them."""

    scale_factor: float
    scaling: ImageScaling
    drop_rate: float = 0.0
    """Share of the training samples that are told nothing: zeros in the condition's place."""
    everywhere: bool = False
    """Whether the image stands at every frame, not at the first alone."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop_rate <= 1.0:
            raise ConfigError(f"noised_image_dropout is {self.drop_rate}; give a probability, 0 to 1")
        if self.scaling not in IMAGE_SCALINGS:
            raise ConfigError(f"image_scaling is '{self.scaling}'; give one of {', '.join(IMAGE_SCALINGS)}")

    def condition(self, image_latents: Tensor, num_frames: int) -> Tensor:
        """The condition of a clip (t c h w), of its image's latents (1 c h w) as the VAE gives them."""
        scaled = scale_image_latents(image_latents, self.scale_factor, self.scaling)
        return spread_over_clip(scaled, num_frames, self.everywhere)

    def of_images(self, vae: Any, images: Tensor, num_frames: int) -> Tensor:
        """Conditions (b t c h w) for sampling, of images (b 1 3 H W) in [-1, 1]. Nothing is drawn."""
        return torch.stack([self.condition(one, num_frames) for one in vae.encode(images).float()])

    def of_batch(
        self,
        vae: Any,
        batch: Mapping[str, Any],
        latents: Clips,
        seed: int,
        stream: str,
        counters: Sequence[int],
        is_training: bool,
    ) -> Clips:
        """Conditions for the scaled latents (b t c h w) of a batch, or for a list of (t c h w).

        A clip's image is its first frame: the batch's `image` (b 1 3 H W), else that of `pixels`; of clips that come as
        latents, the first latent frame. In training a pixel image has noise, and any may be left out; both are drawn
        from the sample's own streams, and so is the posterior of the VAE.
        """
        draws = sample_uniform(seed, "image drop", counters).tolist()
        conditions = []
        for place, (counter, clip) in enumerate(zip(counters, latents)):
            image = self._first_frame(batch, place, clip)
            if image.shape[1] != clip.shape[1]:  # pixels
                image = image.unsqueeze(0).to(clip)
                if is_training:
                    log_sigmas = sample_normal(seed, "image sigma", [counter], ())
                    image = add_image_noise(
                        image, log_sigmas, sample_normal(seed, "image noise", [counter], image[0].shape)
                    )
                noise = sample_normal(seed, f"{stream}image posterior", [counter], vae.latent_shape(image.shape[1:]))
                image = vae.encode(image, noise=noise.to(image))[0].float()
            condition = self.condition(image, len(clip))
            is_dropped = is_training and draws[place] < self.drop_rate
            conditions.append(torch.zeros_like(condition) if is_dropped else condition)
        return torch.stack(conditions) if isinstance(latents, Tensor) else conditions

    def _first_frame(self, batch: Mapping[str, Any], place: int, clip: Tensor) -> Tensor:
        """The image of a clip: pixels (1 3 H W), or latents (1 c h w) as the VAE gives them."""
        if "image" in batch:
            return batch["image"][place]
        if "pixels" in batch and batch["pixels"][place].shape[1] != clip.shape[1]:
            return batch["pixels"][place][:1]
        warn_once("the clips come as latents: the image that each continues is its first latent frame, without noise")
        return clip[:1] / self.scale_factor
