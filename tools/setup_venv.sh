# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with the pinned versions of constraints.txt and
# this project with the extra named by the first argument. Installs only where something is missing or has changed.
extra=${1:?usage: source tools/setup_venv.sh EXTRA}
PYTHON=${PYTHON:-python3}

"$PYTHON" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}; set PYTHON=/path/to/python3.11")
PY

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate

wanted=$(cat setup.py constraints.txt | cksum)
stamp=.venv/installed-$extra
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing the pinned versions into .venv (a minute or two)" >&2
  # torch alone and first, so that no other package chooses its build: the CPU's where there is no GPU and pip finds it.
  torch=$(grep '^torch==' constraints.txt)
  command -v nvidia-smi > /dev/null || cpu_build=$torch+cpu
  # Without compiling: Python compiles what is imported, a small part, when it is (see below).
  install_torch() { pip install --quiet --no-compile "$1" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}; }
  install_torch "${cpu_build:-$torch}" 2> /dev/null || install_torch "$torch"
  pip install --quiet --no-compile --constraint constraints.txt --editable ".[$extra]"
  echo "$wanted" > "$stamp"
fi
export TORCH_EXTENSIONS_DIR="$PWD/.cache/torch_extensions"  # another project's builds do not mix with ours
unset PYTHONDONTWRITEBYTECODE  # many a container sets it; every process would compile all that it imports
