#!/usr/bin/env bash
# SPPO on google/gemma-2-9b-it as in the authors' release: three iterations, every GPU.
#   bash run_sppo_gemma-2.sh [--model M] [--iterations N] [--prompts P] [--gpus LIST] [--recipe FILE] [--org ORG] ...
# The paper's settings: --recipe recipes/sppo/paper-gemma-2.yaml
# Run again, it goes on where it stopped. All flags: bash run_sppo_gemma-2.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/run.sh" --model google/gemma-2-9b-it --name gemma-2-9b-it-sppo --batch_size 4 "$@"
