#!/usr/bin/env bash
# SPPO on google/gemma-2-27b-it: three iterations, every GPU. The authors' release names no 27B model.
#   bash run_sppo_gemma-2-27b.sh [--model M] [--iterations N] [--prompts P] [--gpus LIST] [--recipe FILE] [--org ORG] ...
# The nearest to the paper's settings: --recipe recipes/sppo/paper-gemma-2.yaml
# Run again, it goes on where it stopped. All flags: bash run_sppo_gemma-2-27b.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/run.sh" --model google/gemma-2-27b-it --name gemma-2-27b-it-sppo --batch_size 1 "$@"
