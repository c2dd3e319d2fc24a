"""The command line of train_video.py."""

import argparse
import logging
import sys
from collections.abc import Sequence

from sat.config import annotate_config, split_overrides
from sat.environment import prepare_environment
from sat.errors import SatError
from sat.logs import setup_logging
from sat.training.preset import load_run_config
from sat.training.stages import plan_stages, stage_lines

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  python train_video.py --base configs/tiny.yaml args.save=runs
  torchrun --nproc_per_node 8 train_video.py --base configs/cogvideox_5b.yaml configs/sft.yaml args.train_data=[videos]
  python train_video.py --base configs/cogvideox_5b.yaml configs/sft.yaml --print-config
  python train_video.py --base configs/sft.yaml args.load=CogVideoX-5B/transformer    the weights tell the model
  python train_video.py --base configs/cogvideox_5b.yaml configs/sft.yaml --plan --device h200 --world 8
  torchrun ... train_video.py --base ... args.model_parallel_size=2 --selfcheck    check a cluster and a layout

The same command again continues the run from its newest whole checkpoint (args.resume=never starts a new one).
exit codes: 0 finished; 2 an error that you can mend; 75 stopped by a signal or args.time_limit_minutes, having saved (0
under torchrun --max-restarts, which would start it again); 128 + N ended at once by a second signal N. torchrun itself
ends with 1 where one of its processes ended with anything but 0, and after a signal.
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of train_video.py."""
    parser = argparse.ArgumentParser(
        prog="train_video.py",
        description="Train a video diffusion transformer, or its VAE, from YAML files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base", nargs="+", required=True, metavar="YAML", help="configuration files, merged left to right"
    )
    parser.add_argument("--seed", type=int, default=42, help="of weights, noise, timesteps and data order (default 42)")
    parser.add_argument(
        "--print-config", action="store_true", help="print the merged configuration, who set what, and stop"
    )
    parser.add_argument(
        "--selfcheck",
        action="store_true",
        help="check ranks, bandwidth and numbers of this job in about a minute and stop; exit code 1 if they are wrong",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print memory and time of each layout on --world devices, choose one and stop; needs no GPU, no weights",
    )
    parser.add_argument("--device", help="for --plan: h200, a100, ... (default: this machine's GPU, or h200)")
    parser.add_argument("--world", type=int, default=1, help="for --plan: number of devices (default 1)")
    parser.add_argument(
        "--profile", action="store_true", help="watch steps 3 to 5; a trace and a table of times go to RUN/profile"
    )
    parser.add_argument(
        "--memory-profile", action="store_true", help="the same for memory: a snapshot on a GPU, a table on a CPU"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the files")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Parse, build, run. Errors that a user can mend end in one message and exit code 2."""
    options = build_parser().parse_intermixed_args(words)
    base, overrides = split_overrides(options.base)
    overrides += options.overrides
    prepare_environment()
    setup_logging()
    try:
        config = load_run_config(base, overrides)
        if options.print_config:
            print(annotate_config(config))
            print("\n".join(f"# {line}" for line in stage_lines(plan_stages(config, options.seed))))
            return
        if options.plan:
            from sat.training.planning.run import plan

            for stage in plan_stages(config, options.seed):
                if stage.name is not None:
                    print(f"stage {stage.name}")
                print(plan(stage.config, options.device, options.world))
            return
        # DeepSpeed and the data readers are not needed above.
        if options.selfcheck:
            from sat.training.selfcheck import selfcheck

            sys.exit(0 if selfcheck(config, options.seed) else 1)
        from sat.training.loop import train
        from sat.training.profiling import Profiling
        from sat.training.signals import exit_code

        code = exit_code(train(config, options.seed, Profiling(options.profile, options.memory_profile)))
    except SatError as error:
        log.error("error: %s", error)
        code = 2
    if code:
        sys.exit(code)
