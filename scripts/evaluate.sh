#!/usr/bin/env bash
# A benchmark suite for a model: scripts/evaluate.py, with the project's own Python.
#
#   bash scripts/evaluate.sh --model runs/x/iter3/model --suite alpaca_eval --judge_url http://host:8000/v1 --judge_model J
#
# What it reads and writes, and all flags: bash scripts/evaluate.sh --help
# Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" "$root/scripts/evaluate.py" "$@"
