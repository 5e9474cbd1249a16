#!/usr/bin/env bash
# Make .venv with everything the tests need (vLLM's CPU build too), then run ruff, pyright, shellcheck and pytest.
#   bash run_tests.sh                    what a newcomer runs: every stage, one loop, vLLM once; some minutes
#   bash run_tests.sh --all              everything else too, as .ci/run does; 20 to 40 minutes on two cores
#   bash run_tests.sh --gpu              what only a GPU shows; a few minutes, with every GPU that is visible
#   bash run_tests.sh [--all | --gpu] [pytest's arguments]
# Exit codes: 0 all passed, else that of what failed.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' run_tests.sh; exit 0 ;; esac
apt() { # Debian packages, while pip installs its own; where they cannot be had, their tests say so
  local need=() log
  log=$(mktemp)
  PATH=$PATH:/usr/sbin command -v slurmctld > /dev/null || need+=(slurm-wlm munge)
  command -v chromedriver > /dev/null || need+=(chromium chromium-driver)
  if [ ${#need[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends "${need[@]}"; } > "$log" 2>&1 \
      || { echo "run_tests: not by apt-get: ${need[*]}; the end of its log:"; tail -n 5 "$log"; }
  fi
  rm "$log"
}
# the report is shown to a real browser, and jobs run under a real Slurm
if [ "${1:-}" = --all ]; then apt & fi
unset PYTHONDONTWRITEBYTECODE # what the tests import is compiled once, and not in each of their processes
bash scripts/install.sh tests
wait
unset VIRTUAL_ENV PYTHON
which=(-m "not slow")
processes=2
if [ "${1:-}" = --all ]; then
  shift
  which=(--durations=50) # where CI's minutes go
  processes=4 # what waits for a cluster leaves its core to the others
  # the longest first, so that none is left alone at the end
  [ $# -gt 0 ] || set -- tests/test_{slurm,ray,faults,smollm2,suites,generation,loop,resume}.py tests/test_*.py
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
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright # else it asks PyPI whether there is a newer one
.venv/bin/shellcheck --external-sources ./*.sh scripts/*.sh recipes/*.slurm .ci/run
# tests share the cores, each with several processes: a thread that waits must not spin on a core that another needs
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0
exec .venv/bin/python -m pytest --numprocesses "$processes" --dist loadscope --no-loadscope-reorder "${which[@]}" "$@"
