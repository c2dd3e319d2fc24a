"""Fetch a released model into a tree that train_video.py and sample_video.py load, with one command.

    python tools/fetch_weights.py cogvideox-5b --to CogVideoX-5B
    python tools/fetch_weights.py cogvideox-2b --to CogVideoX-2B --from transformer.zip --from vae.zip --from hub/t5
    python tools/fetch_weights.py --list

A download that breaks off goes on where it stopped when the same command runs again. Only whole parts get into the
target. Where just diffusers' weights are to be had, they are given SAT's names here.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.errors import SatError
from sat.logs import setup_logging
from sat.weights.fetch import PARTS, fetch
from sat.weights.sources import SOURCES, Source, read_sources, released_model
from sat.weights.survey import survey


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--to", type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--from",
        dest="places",
        action="append",
        metavar="PLACE",
        help="an archive, a folder or a web address, instead of the known ones; may be given several times",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to fetch; all by default")
    parser.add_argument("--sources", type=Path, metavar="YAML", help="your own places: {NAME: [ADDRESS, ...]}")
    parser.add_argument("--list", action="store_true", help="print the models and their places, and stop")
    return parser


def main() -> None:
    """Parse and fetch. Errors that a user can mend end in one message and exit code 2."""
    parser = build_parser()
    options = parser.parse_args()
    setup_logging()
    try:
        table = read_sources(options.sources) if options.sources else SOURCES
        if options.list:
            for name, places in table.items():
                print("\n  ".join([name, *(place.address for place in places)]))
            return
        if options.name is None or options.to is None:
            parser.error("give NAME and --to DIR, or --list")
        preset = released_model(options.name)
        sources = [Source(place) for place in options.places or ()] or table[preset.name.lower()]
        fetch(preset, sources, options.to, options.parts)
        print("\n".join(survey(options.to).lines()))
    except SatError as error:
        logging.getLogger("sat").error("error: %s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
