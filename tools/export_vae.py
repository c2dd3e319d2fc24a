"""Write the VAE of a training run in the layout of the released 3d-vae.pt.

python tools/export_vae.py runs/vae/vae-11-24-10-00 3d-vae.pt
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.errors import SatError
from sat.logs import setup_logging
from sat.vae import save_vae_state
from sat.vae.checkpoint import open_vae_state


def main(words: Sequence[str] | None = None) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory, one of its iterations, or a file of weights")
    parser.add_argument("out", type=Path, help="file to write")
    options = parser.parse_args(words)
    setup_logging()
    try:
        with open_vae_state(options.run) as state:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            save_vae_state(state, options.out)
    except SatError as error:
        logging.getLogger("sat").error("error: %s", error)
        sys.exit(2)
    print(f"wrote {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
