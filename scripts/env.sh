# Sourced by every bash script here: `root`, the Python to use, and the library on its path.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    PYTHON=$root/.venv/bin/python # what scripts/install.sh made
  elif command -v python > /dev/null; then
    PYTHON=python
  else
    PYTHON=python3
  fi
fi
# No file of the current directory runs as a module: `python -m` looks there first, and so does Python for an empty entry
# of PYTHONPATH.
PYTHONPATH=:${PYTHONPATH:-}:
while [[ $PYTHONPATH == *::* ]]; do PYTHONPATH=${PYTHONPATH//::/:}; done
PYTHONPATH=$root${PYTHONPATH%:} PYTHONSAFEPATH=1
export PYTHON PYTHONPATH PYTHONSAFEPATH
