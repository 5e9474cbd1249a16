#!/usr/bin/env bash
# Make .venv with everything the tests need (vLLM's CPU build too), then run ruff, shellcheck and pytest.
#   bash run_tests.sh                    what a newcomer runs: every stage, one loop, vLLM once; some minutes
#   bash run_tests.sh --all              everything else too, as .ci/run does; under half an hour on two cores
#   bash run_tests.sh --clusters         what dies on a real Slurm and a real Ray; a quarter of an hour, much of it waiting
#   bash run_tests.sh --gpu              what only a GPU shows; a few minutes, with every GPU that is visible
#   bash run_tests.sh [--all | --clusters | --gpu] [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/install.sh tests
unset VIRTUAL_ENV PYTHON
which=(-m "not slow and not clusters")
if [ "${1:-}" = --all ] || [ "${1:-}" = --clusters ]; then
  which=(-m "not clusters")
  [ "$1" = --all ] || which=(-m clusters)
  shift
  # the report is shown to a real browser, and jobs run under a real Slurm; where they cannot be had, those tests say so
  need=()
  PATH=$PATH:/usr/sbin command -v slurmctld > /dev/null || need+=(slurm-wlm munge)
  command -v chromedriver > /dev/null || need+=(chromium chromium-driver)
  if [ ${#need[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends "${need[@]}"; } > .venv/apt.log 2>&1 \
      || echo "run_tests: not by apt-get: ${need[*]} (.venv/apt.log)"
  fi
fi
if [ "${1:-}" = --gpu ]; then
  shift
  cards=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -) \
    || { echo "error: nvidia-smi finds no GPU; these tests need one" >&2; exit 1; }
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$cards}
  exec .venv/bin/python -m pytest -m gpu tests/test_gpu.py "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/shellcheck --external-sources ./*.sh scripts/*.sh recipes/*.slurm .ci/run
# tests share the cores, each with several processes: a thread that waits must not spin on a core that another needs
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "${which[@]}" "$@"
