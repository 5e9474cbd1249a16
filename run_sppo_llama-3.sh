#!/usr/bin/env bash
# SPPO on meta-llama/Meta-Llama-3-8B-Instruct as in the authors' release: three iterations, every GPU.
#   bash run_sppo_llama-3.sh [--model M] [--iterations N] [--prompts P] [--gpus LIST] [--recipe FILE] [--org ORG] ...
# The paper's settings: --recipe recipes/sppo/paper-llama-3.yaml
# Run again, it goes on where it stopped. All flags: bash run_sppo_llama-3.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/run.sh" --model meta-llama/Meta-Llama-3-8B-Instruct --name llama-3-8b-instruct-sppo "$@"
