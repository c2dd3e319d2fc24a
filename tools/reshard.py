"""Write a checkpoint's weights for another number of tensor-parallel ranks, bit for bit the same numbers.

    python tools/reshard.py runs/RUN whole.pt                      one file
    python tools/reshard.py runs/RUN runs/RUN-tp2 --tp 2           a run directory with one file for each of two ranks
    python tools/reshard.py CogVideoX-5B-sat/transformer out --tp 4

Training and sampling read any number of files themselves; this is for tools that want another. Optimizer state is not
written: a run continues from its own checkpoint at any layout. How weights are split follows from the model, which is
found by the run's training_config.yaml or the weights' shapes, or given with --base.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.cogvideox.engine import NETWORK_PREFIX
from sat.config import dump_config, instantiate_from_config, load_yaml
from sat.errors import CheckpointError, ConfigError, SatError
from sat.logs import setup_logging
from sat.mpu.shards import ShardRule, shard_rules
from sat.training.checkpoint import load_parts, reshard
from sat.training.files import write_text
from sat.training.preset import load_run_config
from sat.training.run_dir import MODEL_CONFIG, TRAINING_CONFIG
from sat.weights.finding import CheckpointPath, model_file, open_checkpoint
from sat.weights.whole import LATEST

log = logging.getLogger("sat.reshard")


def split_rules(base: Sequence[str], source: str, weights: Mapping[str, Tensor]) -> dict[str, ShardRule]:
    """How the weights of a checkpoint are split, by their names in it."""
    config = load_run_config(base, [f"args.load={source}"])
    if "network_config" not in config["model"]:
        raise ConfigError(f"the model of {source} has no network_config; only transformers are split over ranks")
    with torch.device("meta"):
        rules = shard_rules(instantiate_from_config(config["model"]["network_config"]))
    prefix = NETWORK_PREFIX if any(name.startswith(NETWORK_PREFIX) for name in weights) else ""
    return {f"{prefix}{name}": rule for name, rule in rules.items()}


def write_file(out: Path, state: Mapping[str, Tensor], step: int) -> None:
    """Write one file of weights, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    torch.save({"module": dict(state), "iteration": step}, partial)
    partial.replace(out)
    log.info("wrote %s", out)


def write_run(
    out: Path,
    checkpoint: CheckpointPath,
    parts: Sequence[Mapping[str, Tensor]],
    rules: Mapping[str, ShardRule],
    tp: int,
) -> None:
    """Write a run directory that holds this one iteration."""
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; name a folder that is not there yet")
    folder = out / str(checkpoint.step)
    for rank, state in enumerate(reshard(parts, rules, tp)):
        write_file(folder / model_file(rank), state, checkpoint.step)
    _describe(out, checkpoint, tp)
    write_text(out / LATEST, folder.name)


def _describe(out: Path, checkpoint: CheckpointPath, tp: int) -> None:
    """Copy the run's descriptions, with the new number of ranks."""
    run = checkpoint.path.parent
    if not checkpoint.is_file and (run / TRAINING_CONFIG).is_file():
        config = load_yaml(run / TRAINING_CONFIG)
        config["args"]["model_parallel_size"] = tp
        write_text(out / TRAINING_CONFIG, dump_config(config))
    if not checkpoint.is_file and (run / MODEL_CONFIG).is_file():
        sizes = json.loads((run / MODEL_CONFIG).read_text(encoding="utf-8"))
        write_text(out / MODEL_CONFIG, json.dumps({**sizes, "model_parallel_size": tp}, indent=1))


def main(words: Sequence[str] | None = None) -> None:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a run directory, one of its iterations, or a file of weights")
    parser.add_argument("out", type=Path, help="a file NAME.pt for one rank, or the run directory to make")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default 1)")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="configuration with the model")
    options = parser.parse_args(words)
    setup_logging()
    try:
        if options.tp < 1 or (options.out.suffix == ".pt" and options.tp > 1):
            raise ConfigError(
                f"--tp {options.tp} does not go with {options.out}: one file holds the weights of one rank"
            )
        with open_checkpoint(options.source) as checkpoint:
            parts = load_parts(checkpoint)
            rules = split_rules(options.base, str(checkpoint.path), parts[0])
            if options.out.suffix == ".pt":
                write_file(options.out, next(reshard(parts, rules, 1)), checkpoint.step)
            else:
                write_run(options.out, checkpoint, parts, rules, options.tp)
    except SatError as error:
        log.error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
