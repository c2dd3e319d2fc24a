"""Find the noise from which a clip or an image would be sampled: DDIM run backwards.

    python tools/invert.py clip.mp4 --load RUN --prompt "a red square moving right" --out noise.safetensors
    python sample_video.py --load RUN args.initial_noise=noise.safetensors --prompt "a blue square moving right" \\
        model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler

CLIP may also be a file of latents (args.only_save_latents). The prompt says what the clip shows; a model that continues
images gets the clip's first frame. Without guidance
(model.sampler_config.params.guider_config.params.scale=1) and with the same prompt, sampling gives the clip back; how
well is printed. With another prompt it is edited.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from safetensors.torch import save_file

from sat.config import split_overrides
from sat.diffusion.samplers import Step
from sat.environment import prepare_environment
from sat.errors import SatError
from sat.logs import setup_logging
from sat.mpu.launch import joined
from sat.mpu.recorder import recorded
from sat.sampling.args import sample_args
from sat.sampling.cli import read_config
from sat.sampling.inputs import NOISE_NAME, read_image, read_latents
from sat.sampling.run import SamplingRun

log = logging.getLogger("sat.tools.invert")

WAIT_MINUTES = 30.0
"""How long a collective may take."""
DDIM_WITHOUT_GUIDANCE = (
    "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler",
    "model.sampler_config.params.guider_config={target: sgm.modules.diffusionmodules.guiders.IdentityGuider}",
)


def invert(run: SamplingRun, clip: Path, prompt: str, out: Path, num_iterations: int) -> float:
    """Write the noise of a clip; returns how far sampling from it ends from the clip's latents.

    The measure is the root mean square of the difference, as a share of the latents' standard deviation.
    """
    engine = run.engine
    latents = read_latents(engine, clip, run.latent_shape).unsqueeze(0).to(engine.device)
    images = None
    if engine.image_conditioner is not None:
        images = read_image(clip, (run.sizes.height, run.sizes.width)).unsqueeze(0)

    def advance(step: Step) -> None:
        run.recorder.step = step.index

    noise = engine.invert(latents, [prompt], num_iterations, advance, images)
    again = engine.sample([prompt], [0], run.seed, run.latent_shape, advance, noise[0], images=images)
    metadata = {"prompt": prompt, "clip": str(clip), "steps": str(engine.sampler.num_steps)}
    save_file({NOISE_NAME: noise[0].cpu().contiguous()}, out, metadata=metadata)
    return float((again - latents).square().mean().sqrt() / latents.std())


def main() -> None:
    """Parse, invert, and say how well it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="video, image, or safetensors file of latents")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="as for sample_video.py")
    parser.add_argument("--load", help="weights, as for sample_video.py")
    parser.add_argument("--prompt", required=True, help="what the clip shows")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--iterations", type=int, default=4, help="calls of the network a step (default 4)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    prepare_environment()
    setup_logging()
    try:
        base, overrides = split_overrides(options.base)
        overrides = [*overrides, *options.overrides, *DDIM_WITHOUT_GUIDANCE, f"args.output_dir={options.out.parent}"]
        config = read_config(base, options.load, overrides)
        with joined(WAIT_MINUTES) as launch, recorded(launch, WAIT_MINUTES) as recorder:
            run = SamplingRun(config, sample_args(config), seed=0, recorder=recorder)
            error = invert(run, options.clip, options.prompt, options.out, options.iterations)
        log.info(
            "wrote %s; sampling from it ends %.1f %% of the latents' spread from the clip", options.out, 100 * error
        )
    except SatError as error:
        log.error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
