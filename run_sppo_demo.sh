#!/usr/bin/env bash
# The whole loop on this machine, with tiny models that it makes itself: three iterations, then a table.
#   bash run_sppo_demo.sh [--seed N] [--run_dir DIR] [any flag of run_sppo_mistral.sh]
# Needs Python 3.11 to 3.14, nothing else; makes .venv. Run again, it goes on where it stopped.
set -euo pipefail
name=demo packages=core made=world/seed.json
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/begin.sh"
"$PYTHON" "$root/scripts/make_demo.py" --output_dir "$run/world" --seed "$seed"
exec bash "$root/scripts/run.sh" --recipe "$root/recipes/sppo/demo.yaml" --name demo --model "$run/world/policy" \
  --prompts "$run/world/train.jsonl" --split_prompts --ranker "$run/world/ranker" \
  --eval_prompts "$run/world/heldout.jsonl" --judge examples.demo:rule --evaluate --run_dir "$run" --gpus none "$@"
