"""Fill the cache of a training run ahead of it: what its encoders make of all clips and captions.

    python tools/precompute.py --base configs/demo.yaml args.cache=all args.cache_dir=CACHE args.train_data=[CLIPS]
    torchrun --standalone --nproc_per_node 8 tools/precompute.py --base ... args.cache=all args.cache_dir=CACHE

The configuration is the training run's. Processes share the clips of args.train_data and args.valid_data, in every
stage where there are stages. A job that was killed goes on where it was; of clips that are added later, only they are
computed. With args.cache_read_only=true nothing is, and it is an error if the cache lacks anything. Prints what was
done, with the scale factor that gives the latents a standard deviation of 1. Where a clip does not fit into one
device's memory, args.context_parallel_size=N lets N processes share it.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.config import ConfigNode, instantiate_from_config, split_overrides
from sat.data.cache import BAD
from sat.environment import prepare_environment
from sat.errors import ConfigError, DataError, SatError
from sat.logs import setup_logging
from sat.mpu.launch import Launch, joined
from sat.mpu.recorder import recorded
from sat.mpu.state import ParallelState, set_parallel_state
from sat.training.args import train_args
from sat.training.caches import Caches, check_cache
from sat.training.data import TrainingData, ValidationData
from sat.training.preset import load_run_config
from sat.training.preview import model_parts
from sat.training.stages import Stage, plan_stages
from sat.training.systems import check_files


class Encoders:
    """The encoders of a model section, built when they are first asked for and kept for stages with the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._built: dict[str, Any] = {}

    def build(self, config: ConfigNode, key: str) -> Any:
        """The frozen encoder that a section describes; None where there is no such section."""
        node = model_parts(config).get(key)
        if node is None:
            return None
        name = json.dumps(node.plain(), sort_keys=True, default=str)
        if name not in self._built:
            self._built[name] = instantiate_from_config(node).eval().to(self.device)
        return self._built[name]


def latent_std(dataset: Any) -> float:
    """Standard deviation of the latents of a dataset that reads from a cache, each clip counted once."""
    parts: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    keys = {bytes(key).decode() for part in parts for key in part.keys}
    facts = [facts for facts in parts[0].latents.facts_of(keys) if BAD not in facts]
    if not facts:
        raise DataError("no clip can be used, so there are no latents to measure")
    mean, square = (math.fsum(one[name] for one in facts) / len(facts) for name in ("mean", "square"))
    return (square - mean**2) ** 0.5


def fill_stage(stage: Stage, encoders: Encoders, launch: Launch, parallel: ParallelState) -> dict[str, Any]:
    """Complete the caches of a stage; returns what was done."""
    args, config = stage.args, stage.config
    if args.cache == "none":
        raise ConfigError("args.cache is none, so there is nothing to compute; give text, latents or all")
    check_cache(config, args)
    check_files(config)
    vae = encoders.build(config, "first_stage_config") if args.cache != "text" else None
    conditioner = encoders.build(config, "conditioner_config") if args.cache != "latents" else None
    caches = Caches(args, vae, conditioner, launch, parallel)
    layout = (1, 1, 0, 1)  # batch sizes and ranks change nothing of what is read
    data = TrainingData(config, args, stage.seed, *layout)
    data.read_through(caches.complete)
    validation = ValidationData.build(config, args, stage.seed, *layout)
    if validation is not None:
        validation.read_through(caches.complete)
    report: dict[str, Any] = {"stage": stage.name} if stage.name is not None else {}
    report |= {cache.kind: dict(cache.counts) for cache in (caches.latents, caches.texts) if cache is not None}
    if caches.latents is not None:
        std = latent_std(data.dataset)
        report |= {"latent_std": std, "scale_factor": 1.0 / std}
    return report


def main(words: Sequence[str] | None = None) -> None:
    """Parse and fill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="the training run's; values may follow them"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the files")
    options = parser.parse_intermixed_args(words)
    base, overrides = split_overrides(options.base)
    prepare_environment()
    setup_logging()
    try:
        config = load_run_config(base, [*overrides, *options.overrides])
        args = train_args(config)
        with joined(args.timeout_minutes) as launch, recorded(launch, args.timeout_minutes):
            # No transformer is built, so that only the sharing of clips is of the training run's layout.
            parallel = ParallelState.build(cp=args.context_parallel_size, device_type=launch.device.type)
            set_parallel_state(parallel)
            encoders = Encoders(launch.device)
            reports = [fill_stage(stage, encoders, launch, parallel) for stage in plan_stages(config, options.seed)]
            if launch.is_main:
                print(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1))
    except SatError as error:
        logging.getLogger("sat").error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
