"""The command line of sample_video.py."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sat.config import ConfigNode, annotate_config, load_config, split_overrides
from sat.environment import prepare_environment
from sat.errors import CheckpointError, ConfigError, SatError
from sat.logs import setup_logging
from sat.sampling.args import sample_args, sampling_sizes
from sat.sampling.like import SYSTEMS, overrides_like
from sat.training.args import LAYOUT_KEYS
from sat.training.preset import load_run_config

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  python sample_video.py --load runs/demo-11-24-10-00 --prompt "a red square moving right"
  python sample_video.py --base configs/inference.yaml args.load=CogVideoX-5B/transformer      released weights
  python sample_video.py --load CogVideoX-5B/transformer --lora runs/lora-11-24-10-00 --prompt "..."      adapters
  python sample_video.py --load ... --prompt "..." args.reuse_threshold=0.1      faster; the log says what it changed
  torchrun --nproc_per_node 8 sample_video.py --base ... args.input_file=prompts.txt      prompts are shared out
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of sample_video.py."""
    parser = argparse.ArgumentParser(
        prog="sample_video.py",
        description=(
            "Sample videos from prompts. Without --base, the run directory that is loaded says how it was trained, and "
            "released weights tell their model by their shapes."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base", nargs="+", default=[], metavar="YAML", help="configuration files, merged left to right"
    )
    parser.add_argument(
        "--load", metavar="PATH", help="weights: a file, an iteration folder or a run directory (same as args.load=...)"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt, for image to video TEXT@@IMAGE; may be given several times",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH",
        help="adapters to put on the model: a file, or a run that trained them; may be given several times",
    )
    parser.add_argument(
        "--lora-scale", action="append", type=float, metavar="X", help="strength of each --lora in turn (default 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="of all noise; the same seed gives the same videos (default 42)"
    )
    parser.add_argument(
        "--like",
        choices=SYSTEMS,
        help="sample as that system does: name every knob in which the two differ, and set those that can be",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the merged configuration, who set what, and stop"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the files")
    return parser


def read_config(base: Sequence[str], load: str | None, overrides: Sequence[str]) -> ConfigNode:
    """The configuration of the files, or of the run directory whose weights are loaded, or of released weights."""
    if load is not None:
        overrides = [*overrides, f"args.load={json.dumps(load)}"]  # in quotes, so that YAML takes it as a text
    if base:
        return load_run_config(base, overrides)
    beside = _config_beside(load_config([], overrides)["args"].get("load"))
    if beside is None:
        return load_run_config([], overrides)
    config = load_config([beside], overrides)
    for key in LAYOUT_KEYS:  # training's layout says nothing about this job's
        origin = config["args"].origins.get(key)
        if origin is not None and origin.file == str(beside):
            del config["args"][key]
    return config


def _config_beside(load: str | None) -> Path | None:
    """The configuration that training left in the run directory which a checkpoint is, or is in; None if it did not."""
    from sat.training.run_dir import TRAINING_CONFIG  # it loads torch, which the environment must be ready for

    if load is None:
        raise ConfigError("give --load RUN_DIRECTORY, or --base with configuration files")
    path = Path(load)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}; give a file, an iteration folder or a run directory")
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / TRAINING_CONFIG).is_file():
            return folder / TRAINING_CONFIG
    return None


def main(words: Sequence[str] | None = None) -> None:
    """Parse, build, run. Errors that a user can mend end in one message and exit code 2."""
    options = build_parser().parse_intermixed_args(words)
    base, overrides = split_overrides(options.base)
    overrides += options.overrides
    for name in ("lora", "lora_scale"):
        if getattr(options, name) is not None:
            overrides.append(f"args.{name}={json.dumps(getattr(options, name))}")
    prepare_environment()
    setup_logging()
    try:
        config = read_config(base, options.load, overrides)
        if options.like:
            words, lines = overrides_like(config, options.like)
            config = read_config(base, options.load, [*words, *overrides])  # the user's own words win
            log.info("%s", "\n".join(lines))
        if options.print_config:
            print(annotate_config(config))
            print(f"# {sampling_sizes(config, sample_args(config))}")
            return
        from sat.sampling.run import sample  # the readers of video and text are not needed above

        sample(config, options.seed, options.prompt)
    except SatError as error:
        log.error("error: %s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        log.warning("stopped; the videos that were finished stay")
        sys.exit(130)
