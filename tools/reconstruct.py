"""Pass clips through the VAE and write what comes out, to see what it keeps and loses.

    python tools/reconstruct.py --base configs/demo.yaml --data data/shapes --out runs/reconstructed --clips 60

Writes one mp4 a clip, with its caption in the metadata, and summary.json with the PSNR (dB; latents are the
posterior's mean, decoded in chunks as in sampling), and the flicker: mean |difference| of neighbouring frames in grey
levels (0 to 255), of the clips and of their reconstructions.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.cogvideox.output import to_frames
from sat.config import instantiate_from_config, load_config
from sat.data.video import write_mp4
from sat.errors import ConfigError, SatError
from sat.logs import setup_logging
from sat.vae.losses import psnr


def flicker(pixels: Tensor) -> float:
    """Mean |difference| of neighbouring frames of (t 3 h w) in [-1, 1], in grey levels of 0 to 255."""
    return float(pixels.diff(dim=0).abs().mean()) * 127.5


@torch.no_grad()
def reconstruct(vae: Any, sample: dict[str, Any], out: Path) -> dict[str, float]:
    """Write the reconstruction of one sample; returns its measures."""
    pixels = sample["pixels"]
    latents = vae.encode(pixels.unsqueeze(0).to(next(vae.parameters()).device))
    decoded = torch.cat(list(vae.decode_chunks(latents)), dim=1)[0].cpu().clamp(-1.0, 1.0)
    write_mp4(out, to_frames(decoded), sample["fps"], {"prompt": sample["caption"]})
    count = min(len(decoded), len(pixels))
    mean_square = (decoded[:count] - pixels[:count]).square().mean()
    return {"psnr": float(psnr(mean_square)), "flicker": flicker(decoded), "flicker_real": flicker(pixels)}


def main() -> None:
    """Parse and reconstruct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="configuration with first_stage_config and data"
    )
    parser.add_argument("--data", required=True, help="folder or manifest of clips")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--clips", type=int, default=60, help="how many, from the first on (default 60)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    setup_logging()
    try:
        config = load_config(options.base, options.overrides)
        first_stage = config["model"].get("first_stage_config")
        if first_stage is None:
            raise ConfigError("the configuration has no model.first_stage_config")
        vae = instantiate_from_config(first_stage).eval()
        dataset = instantiate_from_config(config["data"], data_dir=options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        count = min(options.clips, len(dataset))
        measures = [reconstruct(vae, dataset[index], options.out / f"{index:05d}.mp4") for index in range(count)]
    except SatError as error:
        logging.getLogger("sat").error("error: %s", error)
        sys.exit(2)
    summary = {name: sum(measure[name] for measure in measures) / count for name in measures[0]}
    (options.out / "summary.json").write_text(json.dumps({"clips": count, **summary}, indent=1), encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
