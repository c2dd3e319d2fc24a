"""Convert weights between SAT, diffusers and ComfyUI, and prove that nothing changed on the way.

    python tools/convert.py runs/sft-11-24-10-00 CogVideoX-mine --to diffusers
    python tools/convert.py CogVideoX-5b CogVideoX-5B-sat --to sat
    python tools/convert.py CogVideoX1.5-5B-sat ComfyUI/models --to comfy
    python tools/convert.py runs/lora-11-24-10-00 my_lora.safetensors --to diffusers

SRC may be a run, one of its iterations, a tree or folder of either system, or one file; generation, task, adapters,
averaged weights and shards are found by names and shapes. DST must not be there yet; where it ends in .safetensors or
.pt it is one file. It appears whole, and only if what was written is read back bit for bit and both systems' classes
give the same numbers for it. See docs/conversion.md.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.errors import SatError
from sat.logs import setup_logging


class Parser(argparse.ArgumentParser):
    """Says which option has taken SRC or DST for its own, where one of them is missing."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        greedy = [option for option in ("--merge-lora", "--base") if option in self.words]
        if greedy and "DST" in message:
            message += f"; {greedy[0]} takes the words after it: put SRC and DST first"
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC", help="what to convert")
    parser.add_argument("target", type=Path, metavar="DST", help="where to; it must not be there yet")
    parser.add_argument("--to", choices=("sat", "diffusers", "comfy"), required=True, help="the layout to write")
    parser.add_argument(
        "--base",
        type=Path,
        nargs="+",
        default=(),
        metavar="YAML",
        help="the model section, where the weights are of no released size and nothing beside them describes them",
    )
    parser.add_argument("--vae", type=Path, metavar="PATH", help="the VAE to put beside the transformer")
    parser.add_argument("--t5", type=Path, metavar="DIR", help="T5's folder to put beside the transformer")
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        default="auto",
        help="of a run: averaged (ema) or trained (raw); by default averaged where there are some",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="precision to write; by default as it is")
    parser.add_argument(
        "--merge-lora",
        nargs="?",
        const=True,
        default=None,
        metavar="BASE",
        help="fold adapters into the weights; BASE: the model they are for, where SRC holds adapters alone",
    )
    parser.add_argument("--lora-alpha", type=float, metavar="X", help="alpha of adapters whose file does not say it")
    parser.add_argument(
        "--nodes",
        choices=("core", "wrapper"),
        default="core",
        help="for --to comfy: ComfyUI's own nodes, or those of ComfyUI-CogVideoXWrapper",
    )
    parser.add_argument(
        "--check",
        type=_check,
        default="auto",
        metavar="LAYERS",
        help="how many layers to run through both systems' classes: a number, all, none; by default all of a small "
        "model and two of a large one. Every tensor is read back and compared in any case",
    )
    return parser


def _check(word: str) -> int | str:
    if word in ("auto", "all", "none"):
        return word
    if word.isdigit() and int(word) > 0:
        return int(word)
    raise argparse.ArgumentTypeError(f"'{word}' is neither a number of layers nor all, none or auto")


def main() -> None:
    """Parse and convert. Errors that a user can mend end in one message and exit code 2."""
    options = build_parser().parse_args()
    setup_logging()
    from sat.convert.run import Request, convert  # seconds: it needs torch

    merge_base = None if options.merge_lora in (None, True) else Path(options.merge_lora)
    try:
        lines = convert(
            Request(
                source=options.source,
                target=options.target,
                to=options.to,
                base=options.base,
                vae=options.vae,
                text_encoder=options.t5,
                weights=options.weights,
                dtype=options.dtype,
                merge=options.merge_lora is not None,
                merge_base=merge_base,
                lora_alpha=options.lora_alpha,
                nodes=options.nodes,
                check=options.check,
            )
        )
    except SatError as error:
        logging.getLogger("sat").error("error: %s", error)
        sys.exit(2)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
