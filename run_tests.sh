#!/usr/bin/env bash
# Make .venv with everything the tests need (vLLM's CPU build too), then run ruff, shellcheck and pytest.
#   bash run_tests.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/install.sh tests
unset VIRTUAL_ENV PYTHON
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/shellcheck --external-sources ./*.sh scripts/*.sh .ci/run
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
