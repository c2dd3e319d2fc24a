"""Replay recorded reference numbers through this project's code, one line for each case; exit code 1 if any is off.

    python tools/replay_golden.py DIR        DIR: one set of recordings, a part of one, or a folder above several

Cases are found by the form of their files, whatever their names. What cannot be replayed is listed with the reason.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

from tools.golden.runner import main

if __name__ == "__main__":
    sys.exit(main())
