"""How much less the loss of a batch scatters with stratified timesteps (CogVideoX, arXiv:2408.06072, sec. 2.5).

Takes the weights of a run as they are, and the mean loss of many batches of its training set: with independent
timesteps, and with one of each stratum. Clips and noise are the same on both sides, so what differs is the drawing
alone; the ratio of the two standard deviations is printed for each batch size. It depends on how much of the scatter
comes from the timestep, so on data and model: it is near 1 where every timestep is as hard as every other.

    python benchmarks/timestep_spread.py RUN --batch-sizes 8 16 32 --batches 200
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.config import ConfigNode, load_config
from sat.environment import prepare_environment
from sat.errors import ConfigError
from sat.training.args import train_args
from sat.training.checkpoint import load_parts
from sat.training.data import TrainingData
from sat.training.run_dir import TRAINING_CONFIG
from sat.training.systems import DiffusionSystem, build_system
from sat.weights.finding import find_checkpoint

SEED = 7


def load_system(run: Path) -> tuple[DiffusionSystem, ConfigNode]:
    """The model of a run with its newest weights, and its configuration."""
    config = load_config([run / TRAINING_CONFIG])
    system = build_system(config, train_args(config))
    if not isinstance(system, DiffusionSystem):
        raise ConfigError(f"{run} trains no diffusion model, so there are no timesteps")
    (weights,) = load_parts(find_checkpoint(run))
    system.trained.load_state_dict(system.rename(weights))
    system.trained.eval()
    return system, config


@torch.no_grad()
def batch_losses(system: DiffusionSystem, data: TrainingData, stratified: bool) -> torch.Tensor:
    """Mean losses (batches,)."""
    system.engine.timestep_sampling.uniform_sampling = stratified
    system.engine.timestep_sampling.group_num = 0
    inputs = (system.training_inputs(batch, SEED, data.global_batch_size) for batch in data.batches(0))
    return torch.stack([system.trained(one)["loss"].mean() for one in inputs])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch size."""
    system, config = load_system(args.run)
    rows = []
    for batch_size in args.batch_sizes:
        own = replace(train_args(config), train_iters=args.batches, epochs=None)
        data = TrainingData(config, own, SEED, batch_size, batch_size, 0, 1)
        independent, stratified = (batch_losses(system, data, way) for way in (False, True))
        rows.append(
            {
                "batch_size": batch_size,
                "mean": float(independent.mean()),
                "independent": float(independent.std()),
                "stratified": float(stratified.std()),
                "ratio": float(stratified.std() / independent.std()),
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a diffusion model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32], help="also the numbers of strata")
    parser.add_argument("--batches", type=int, default=200, help="batches of each kind (default 200)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    prepare_environment()
    rows = measure(args)
    print(f"{'batch':>6}{'mean loss':>12}{'std independent':>18}{'std stratified':>17}{'ratio':>8}")
    for row in rows:
        print("{batch_size:>6}{mean:>12.4f}{independent:>18.4f}{stratified:>17.4f}{ratio:>8.3f}".format(**row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
