#!/usr/bin/env bash
# SPPO on mistralai/Mistral-7B-Instruct-v0.2 as in the authors' release: three iterations, every GPU.
#   bash run_sppo_mistral.sh [--model M] [--iterations N] [--prompts P] [--gpus LIST] [--recipe FILE] [--org ORG] ...
# The paper's settings: --recipe recipes/sppo/paper.yaml
# Run again, it goes on where it stopped. All flags: bash run_sppo_mistral.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/run.sh" --model mistralai/Mistral-7B-Instruct-v0.2 --name mistral-7b-instruct-sppo "$@"
