#!/usr/bin/env bash
# Set-up, then lint, types and the default test suite. Arguments go to pytest, e.g. `bash tools/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_venv.sh test
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy sat
  # Most tests wait for processes that they start, so two at a time fill two cores. A file's tests share what it set up.
  # In the order of their names: by default the files of one long test come last, and a core waits for the other.
  set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
