#!/usr/bin/env bash
# From a fresh machine (Python 3.11 or later, pip) to a trained and sampled video: set-up, then tools/demo.py.
# Everything it makes is under .venv and runs/demo; a second run repeats nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_venv.sh all
exec python tools/demo.py "$@"
