"""Say what files and folders of weights are, which configuration fits them, and the first thing wrong with them.

    python tools/inspect.py CogVideoX-5B-sat runs/sft-11-24-10-00 3d-vae.pt

Reads names and sizes, not the numbers: seconds for 20 GB. Of a run it lists the checkpoints: what each holds, at which
layout it was written, whether it is whole; for that it reads their files and compares checksums, a second or two a
gigabyte, unless --quick is given. Exit code 1 if something is wrong.
"""

import os
import sys

TOOLS = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (pathlib may import `inspect`, see below)

if __name__ == "inspect":
    # Another tool runs, its folder comes first on the path, and the standard library asks for its own module of this
    # name: it gets that one.
    import importlib

    del sys.modules[__name__]
    path, sys.path = sys.path, [folder for folder in sys.path if os.path.abspath(folder) != TOOLS]  # noqa: PTH100
    importlib.import_module(__name__)
    sys.path = path


def main() -> None:
    """Parse, look and print."""
    import argparse
    import logging
    from pathlib import Path

    from tqdm import tqdm

    from sat.errors import SatError
    from sat.logs import setup_logging
    from sat.weights.checkpoints import bytes_to_read, checkpoints
    from sat.weights.survey import survey

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file of weights, or a folder")
    parser.add_argument(
        "--quick", action="store_true", help="of a run's checkpoints compare names and sizes alone, not the content"
    )
    setup_logging()
    options = parser.parse_args()
    status = 0
    for path in options.paths:
        try:
            finding = survey(path)
        except SatError as error:
            logging.getLogger("sat").error("error: %s", error)
            sys.exit(2)
        total = 0 if options.quick else bytes_to_read(path)
        shows_bar = total > 0 and sys.stderr.isatty()
        with tqdm(desc=str(path), total=total, disable=not shows_bar, unit="B", unit_scale=True, leave=False) as bar:
            finding.parts += checkpoints(path, None if options.quick else bar.update)
        problems = finding.problems()
        status = 1 if problems else status
        are_read = total > 0
        verdict = "nothing wrong found" + ("" if are_read else " (the numbers themselves were not read)")
        if problems:
            where, problem = problems[0]
            verdict = f"the first thing wrong: {problem} ({where})"
        print("\n".join([*finding.lines(), f"  {verdict}"]))
    sys.exit(status)


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(TOOLS)  # noqa: PTH120 (in the place of this folder, whose `inspect` this file is)
    main()
