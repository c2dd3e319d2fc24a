#!/usr/bin/env bash
# Set-up, then lint, types and the default test suite. Arguments go to pytest, e.g. `bash tools/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_venv.sh test
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy sat
fi
exec python -m pytest "$@"
