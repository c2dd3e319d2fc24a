"""The causal video VAE: pixels to latents and back.

Letters: `b` batch, `t` latent frames, `z` latent channels, `h w` latent rows and columns; `T H W` are those of pixels.
Video is (b T 3 H W) and (b t z h w) for callers, (b c t h w) for the layers; it turns once at each door. Latents here
are not scaled: diffusion multiplies them by its `scale_factor`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.config import build_dataclass, warn_once
from sat.errors import ConfigError
from sat.mpu.state import ParallelState, get_parallel_state
from sat.vae.causal_conv import FIRST_FRAME_RULES, ConvCache, FirstFrame, records_gradient
from sat.vae.checkpoint import load_vae
from sat.vae.chunks import DECODE_PRESETS, DecodePlan, encode_chunk_sizes, plan_decode
from sat.vae.decoder import Decoder3D, count_pixel_frames
from sat.vae.encoder import Encoder3D, count_latent_frames
from sat.vae.posterior import DiagonalGaussian, DiagonalGaussianRegularizer
from sat.vae.shard import FrameShard
from sat.vae.sharing import Run, RunShared, check_agreement, decode_shared, encode_shared, run_chunks_shared
from sat.vae.tiles import Tiling, run_tiles

__all__ = ["DiagonalGaussianRegularizer", "VideoAutoencoder"]


class VideoAutoencoder(nn.Module):
    """Encoder, decoder, regularizer and, for training, a loss.

    loss: called with (pixels, reconstruction, posterior) by a trainer. ckpt_path: weights to start from, see
    `load_vae_state`. ignore_keys: prefixes of names in them to pass over. decode_preset: how a clip is cut when it is
    decoded, see DECODE_PRESETS; by default as the video model asks that this VAE serves, and alone v1.
    frames_per_chunk: the same for `posterior`; without it clips are encoded whole. tile: fields of Tiling; larger
    clips are encoded and decoded in tiles.

    The context-parallel ranks of `parallel` (by default, the job's) share every clip and get the same numbers as one
    process; they must make the same calls with the same clips. cp_size, the released key for that, changes nothing.
    """

    def __init__(
        self,
        encoder: Encoder3D,
        decoder: Decoder3D,
        regularizer: DiagonalGaussianRegularizer,
        loss: nn.Module | None = None,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        cp_size: int = 1,
        decode_preset: str | None = None,
        frames_per_chunk: int | None = None,
        tile: Mapping[str, Any] | None = None,
        parallel: ParallelState | None = None,
    ) -> None:
        super().__init__()
        self.parallel = get_parallel_state() if parallel is None else parallel
        if cp_size > 1 and cp_size != self.parallel.size("cp"):
            warn_once(
                f"cp_size is {cp_size}, but a clip is shared by args.context_parallel_size = "
                f"{self.parallel.size('cp')} processes; leave cp_size out"
            )
        if decode_preset not in (None, *DECODE_PRESETS):
            raise ConfigError(f"decode_preset is '{decode_preset}'; give one of {', '.join(DECODE_PRESETS)}")
        _check_halves(encoder, decoder)
        self.encoder = encoder
        self.decoder = decoder
        self.regularizer = regularizer
        self.loss = loss
        self.decode_preset = decode_preset
        self.frames_per_chunk = frames_per_chunk
        _check_chunk(frames_per_chunk, self.temporal_factor)
        self.tiling = None if tile is None else build_dataclass(Tiling, tile).in_latents(self.spatial_factor)
        if ckpt_path is not None:
            load_vae(self, ckpt_path, ignore_keys)

    def identity(self) -> dict[str, Any]:
        """What decides the moments besides the encoder's layers and weights."""
        return {"frames_per_chunk": self.frames_per_chunk, "tile": None if self.tiling is None else str(self.tiling)}

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, the first one apart."""
        return 1 << self.encoder.num_halvings

    @property
    def spatial_factor(self) -> int:
        """Pixel rows (columns) per latent row (column)."""
        return self.encoder.spatial_factor

    @property
    def _weight(self) -> Tensor:
        """A weight, for precision and device."""
        return self.encoder.conv_in.conv.weight

    def latent_shape(self, pixel_shape: Sequence[int], first_frame: FirstFrame = "split") -> tuple[int, int, int, int]:
        """(t z h w) of a clip of shape (T 3 H W)."""
        num_frames, _, height, width = pixel_shape
        num_latents = count_latent_frames(num_frames, self.encoder.num_halvings, first_frame)
        return num_latents, self.encoder.z_channels, height // self.spatial_factor, width // self.spatial_factor

    # --- pixels to latents -------------------------------------------------------------------------------------------

    def posterior(
        self,
        pixels: Tensor,
        *,
        first_frame: FirstFrame = "split",
        frames_per_chunk: int | None = None,
        samples_at_a_time: int | None = None,
    ) -> DiagonalGaussian:
        """The distribution of latents (b t z h w) of pixels (b T 3 H W) in [-1, 1].

        first_frame: `split` or `parity`, the same for T = 4k + 1; see FirstFrame. frames_per_chunk: encode in chunks
        of about that many frames, so that memory does not grow with T; norms then see one chunk at a time, which
        changes the numbers from 16 frames on (8 and `parity` give diffusers'). By default the VAE's own; without one
        the clip is encoded whole, as the released models were trained. samples_at_a_time: clips of the batch encoded
        together; changes no number.
        """
        self._check_video(pixels, self.encoder.in_channels, "pixels", self.spatial_factor)
        _check_rule(first_frame)
        frames_per_chunk = self.frames_per_chunk if frames_per_chunk is None else frames_per_chunk
        _check_chunk(frames_per_chunk, self.temporal_factor)
        size = self.latent_shape(pixels.shape[1:], first_frame)[2:]

        def encode(part: Tensor) -> Tensor:
            return self._encode_part(part, first_frame, frames_per_chunk)

        moments = [
            self._in_tiles(encode, group, size, factors=(self.spatial_factor, 1))
            for group in pixels.split(samples_at_a_time or len(pixels))
        ]
        return DiagonalGaussian(_join(moments))

    def _encode_part(self, pixels: Tensor, first_frame: FirstFrame, frames_per_chunk: int | None) -> Tensor:
        """Moments (b t 2z h w) of clips that are encoded together."""
        num_frames = pixels.shape[1]
        sizes = [num_frames] if frames_per_chunk is None else encode_chunk_sizes(num_frames, frames_per_chunk)
        if len(sizes) == 1:
            return self._spread(self._run_encoder, encode_shared, pixels, first_frame)
        rules: list[FirstFrame] = [first_frame] + ["nosplit"] * (len(sizes) - 1)
        chunks = pixels.split(sizes, dim=1)
        shapes = [self.latent_shape(chunk.shape[1:], rule) for chunk, rule in zip(chunks, rules)]
        moment_shapes = [(t, self.encoder.out_channels, h, w) for t, _, h, w in shapes]
        return torch.cat(list(self._in_chunks(self._run_encoder, chunks, rules, moment_shapes)), dim=1)

    def encode(
        self,
        pixels: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        first_frame: FirstFrame = "split",
        frames_per_chunk: int | None = None,
        samples_at_a_time: int | None = None,
    ) -> Tensor:
        """Latents (b t z h w) of pixels (b T 3 H W): a draw with `noise` or from `generator`, without both the mean.

        Options as in `posterior`.
        """
        posterior = self.posterior(
            pixels, first_frame=first_frame, frames_per_chunk=frames_per_chunk, samples_at_a_time=samples_at_a_time
        )
        if noise is None and generator is None:
            return posterior.mean
        return self.regularizer(posterior, noise, generator)

    # --- latents to pixels -------------------------------------------------------------------------------------------

    def decode(
        self, latents: Tensor, *, first_frame: FirstFrame = "split", samples_at_a_time: int | None = None
    ) -> Tensor:
        """Pixels (b T 3 H W), about in [-1, 1], of latents (b t z h w) in one go: T = 4t - 3, or 4t under `nosplit`.

        Memory grows with t; `decode_chunks` is for long clips, and is how the released models decode.
        """
        self._check_video(latents, self.decoder.z_channels, "latents", 1)
        _check_rule(first_frame)

        def decode(part: Tensor) -> Tensor:
            return self._spread(self._run_decoder, decode_shared, part, first_frame)

        return _join(
            [
                self._in_tiles(decode, group, latents.shape[3:], factors=(1, self.spatial_factor))
                for group in latents.split(samples_at_a_time or len(latents))
            ]
        )

    @torch.no_grad()
    def decode_chunks(self, latents: Tensor, plan: str | DecodePlan | None = None) -> Iterator[Tensor]:
        """Pixels (b T' 3 H W) of latents (b t z h w), chunk after chunk along time, for a caller that writes a file.

        plan: a preset's name (see DECODE_PRESETS), as it was released, or a DecodePlan; by default the VAE's
        `decode_preset`, or v1 for every latent. Memory does not depend on t as long as the chunks' lengths do not; with
        tiles, all pixels are there before the first chunk.
        """
        self._check_video(latents, self.decoder.z_channels, "latents", 1)
        if not isinstance(plan, DecodePlan):
            plan = self._plan(plan or self.decode_preset, latents.shape[1])
        remaining = latents[:, 1:] if plan.drop_first else latents
        self._check_plan(plan, remaining.shape[1])
        used, size = remaining[:, : sum(plan.sizes)], latents.shape[3:]
        if self.tiling is None or self.tiling.covers(size):
            yield from self._decode_plan(used, plan)
            return

        def decode(part: Tensor) -> Tensor:
            return torch.cat(list(self._decode_plan(part, plan)), dim=1)

        whole = self._in_tiles(decode, used, size, factors=(1, self.spatial_factor))
        yield from whole.split(self._frames_of(plan), dim=1)

    def _decode_plan(self, latents: Tensor, plan: DecodePlan) -> Iterator[Tensor]:
        """Pixels of the latents of a plan, chunk by chunk."""
        if len(plan.sizes) == 1:
            yield self._spread(self._run_decoder, decode_shared, latents, plan.rules[0])
            return
        height, width = (self.spatial_factor * count for count in latents.shape[3:])
        channels = self.decoder.conv_out.conv.out_channels
        shapes = [(num_frames, channels, height, width) for num_frames in self._frames_of(plan)]
        yield from self._in_chunks(self._run_decoder, latents.split(list(plan.sizes), dim=1), plan.rules, shapes)

    def _frames_of(self, plan: DecodePlan) -> list[int]:
        """Pixel frames of each chunk."""
        halvings = self.decoder.num_halvings
        return [count_pixel_frames(size, halvings, rule) for size, rule in zip(plan.sizes, plan.rules)]

    @staticmethod
    def _plan(preset: str | None, num_latents: int) -> DecodePlan:
        """The plan of a preset as it was released; where none is named, v1 for every latent."""
        return plan_decode("v1", num_latents, every=True) if preset is None else plan_decode(preset, num_latents)

    @torch.no_grad()
    def decode_chunked(
        self, latents: Tensor, plan: str | DecodePlan | None = None, samples_at_a_time: int | None = None
    ) -> Tensor:
        """The same pixels (b T 3 H W) in one tensor; beyond that tensor, memory is that of one chunk."""
        self._check_video(latents, self.decoder.z_channels, "latents", 1)
        if not isinstance(plan, DecodePlan):
            plan = self._plan(plan or self.decode_preset, latents.shape[1])
        result = None
        for start in range(0, len(latents), samples_at_a_time or len(latents)):
            group = latents[start : start + (samples_at_a_time or len(latents))]
            position = 0
            for chunk in self.decode_chunks(group, plan):
                if result is None:
                    result = chunk.new_empty((len(latents), sum(self._frames_of(plan)), *chunk.shape[2:]))
                result[start : start + len(chunk), position : position + chunk.shape[1]] = chunk
                position += chunk.shape[1]
        assert result is not None
        return result

    # --- how a clip is cut and spread --------------------------------------------------------------------------------

    def _in_tiles(
        self, run: Callable[[Tensor], Tensor], video: Tensor, size: Sequence[int], factors: tuple[int, int]
    ) -> Tensor:
        """`run` on a clip of `size` rows and columns of latents, or on its tiles; see `run_tiles`."""
        if self.tiling is None or self.tiling.covers(size):
            return run(video)
        return run_tiles(run, video, self.tiling, size, factors)

    def _spread(self, run: Run, run_shared: RunShared, video: Tensor, rule: FirstFrame) -> Tensor:
        """`run` on the frames of one clip, shared by the processes that there are."""
        group = self.parallel.group("cp")
        if group is None:
            return run(video, None, rule, None)
        return run_shared(run, video, self.encoder.num_halvings, rule, group)

    def _in_chunks(
        self, run: Run, chunks: Sequence[Tensor], rules: Sequence[FirstFrame], shapes: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """`run` on chunks (b t c h w) of a clip, in order, several processes on several of them; `shapes` (t c h w)."""
        group = self.parallel.group("cp")
        if group is not None and not records_gradient(chunks[0], *self.encoder.parameters()):
            whole_shapes = [(len(chunks[0]), *shape) for shape in shapes]
            yield from run_chunks_shared(run, chunks, rules, whole_shapes, self._weight, group)
            return
        cache = ConvCache()
        for chunk, rule in zip(chunks, rules):
            yield run(chunk, cache, rule, None)

    def _run_encoder(
        self, pixels: Tensor, cache: ConvCache | None, first_frame: FirstFrame, shard: FrameShard | None
    ) -> Tensor:
        """Moments (b t 2z h w) of pixels (b T 3 H W)."""
        return _turn_out(self.encoder(self._turn_in(pixels), cache, first_frame, shard))

    def _run_decoder(
        self, latents: Tensor, cache: ConvCache | None, first_frame: FirstFrame, shard: FrameShard | None
    ) -> Tensor:
        """Pixels (b T 3 H W) of latents (b t z h w)."""
        return _turn_out(self.decoder(self._turn_in(latents), cache, first_frame, shard))

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(
        self, pixels: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction (b T 3 H W) of pixels of that shape, T = 4k + 1, and the posterior that it was drawn from."""
        posterior = self.posterior(pixels)
        return self.decode(self.regularizer(posterior, noise, generator)), posterior

    # --- the doors ---------------------------------------------------------------------------------------------------

    def _turn_in(self, video: Tensor) -> Tensor:
        """(b t c h w) -> (b c t h w) in the weights' precision, lying in memory as its device computes best."""
        layout = torch.channels_last_3d if self._weight.device.type == "cpu" else torch.contiguous_format
        turned = rearrange(video, "b t c h w -> b c t h w").to(self._weight.device, self._weight.dtype)
        return turned.contiguous(memory_format=layout)

    def _check_plan(self, plan: DecodePlan, num_latents: int) -> None:
        if sum(plan.sizes) > num_latents or min(plan.sizes, default=0) < 1:
            raise ValueError(f"chunks of {plan.sizes} latents do not fit into the {num_latents} that there are")
        if self.temporal_factor > 1 and 1 in plan.sizes[1:]:
            raise ValueError(
                f"chunks of {plan.sizes} latents: after the first chunk, one latent alone would become one frame "
                f"instead of {self.temporal_factor}; give every later chunk 2 latents or more"
            )

    def _check_video(self, video: Tensor, channels: int, name: str, smallest: int) -> None:
        if video.ndim != 5 or video.shape[2] != channels:
            raise ValueError(f"{name} are {tuple(video.shape)}; give (batch, frames, {channels}, height, width)")
        if not video.is_floating_point():
            raise ValueError(f"{name} are {video.dtype}; give floating-point numbers (pixels lie in [-1, 1])")
        if 0 in video.shape or min(video.shape[3:]) < smallest:
            raise ValueError(
                f"{name} are {tuple(video.shape)}; give at least one clip of one frame of {smallest} x {smallest}"
            )
        if (group := self.parallel.group("cp")) is not None:
            check_agreement(video.shape, name, self._weight.device, group)


def _turn_out(video: Tensor) -> Tensor:
    """(b c t h w) -> (b t c h w), a view."""
    return rearrange(video, "b c t h w -> b t c h w")


def _join(groups: list[Tensor]) -> Tensor:
    """One batch of its groups, without a copy if there is only one."""
    return torch.cat(groups) if len(groups) > 1 else groups[0]


def _check_chunk(frames_per_chunk: int | None, factor: int) -> None:
    if frames_per_chunk is not None and (frames_per_chunk < 1 or frames_per_chunk % factor):
        raise ValueError(f"frames_per_chunk is {frames_per_chunk}; give a multiple of the {factor} frames per latent")


def _check_rule(first_frame: str) -> None:
    if first_frame not in FIRST_FRAME_RULES:
        raise ValueError(f"first_frame is '{first_frame}'; give one of {', '.join(FIRST_FRAME_RULES)}")


def _check_halves(encoder: Encoder3D, decoder: Decoder3D) -> None:
    if encoder.z_channels != decoder.z_channels:
        raise ConfigError(
            f"encoder_config has z_channels {encoder.z_channels}, decoder_config {decoder.z_channels}; make them equal"
        )
    if encoder.out_channels != 2 * encoder.z_channels:
        raise ConfigError("encoder_config has double_z: false, but the regularizer needs variances; set double_z: true")
    factors = [(1 << half.num_halvings, half.spatial_factor) for half in (encoder, decoder)]
    if factors[0] != factors[1]:
        raise ConfigError(
            f"the encoder compresses time and space {factors[0][0]}x and {factors[0][1]}x, the decoder expands them "
            f"{factors[1][0]}x and {factors[1][1]}x; give both the same temporal_compress_times and length of ch_mult"
        )
