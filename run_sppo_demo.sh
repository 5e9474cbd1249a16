#!/usr/bin/env bash
# The whole loop on this machine, with tiny models that it makes itself: three iterations, then a table.
#   bash run_sppo_demo.sh [--seed N] [--run_dir DIR] [any flag of run_sppo_mistral.sh]
# Needs Python 3.11 to 3.14, nothing else; makes .venv. Run again, it goes on where it stopped.
set -euo pipefail
unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=$here/runs/demo seed=42 help=false dry_run=false
arguments=("$@")
for i in "${!arguments[@]}"; do
  case ${arguments[i]} in
    --run_dir) run=${arguments[i + 1]:-} ;;
    --run_dir=*) run=${arguments[i]#*=} ;;
    --seed) seed=${arguments[i + 1]:-} ;;
    --seed=*) seed=${arguments[i]#*=} ;;
    --dry_run) dry_run=true ;;
    -h | --help) help=true ;;
  esac
done
if $help && [ ! -x "$here/.venv/bin/python" ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$here/run_sppo_demo.sh"
  exit 0
fi
if $dry_run && [ ! -e "$run/world/seed.json" ]; then
  echo "demo: $run/world is not made yet; without --dry_run this makes it first, in some minutes"
  exit 0
fi

$help || PYTHON="${PYTHON:-}" bash "$here/scripts/install.sh"
unset PYTHON VIRTUAL_ENV
# shellcheck source=scripts/env.sh
source "$here/scripts/env.sh"
if $help; then exec bash "$root/scripts/run.sh" --help; fi
"$PYTHON" "$root/scripts/make_demo.py" --output_dir "$run/world" --seed "$seed"
exec bash "$root/scripts/run.sh" --recipe "$root/recipes/sppo/demo.yaml" --name demo --model "$run/world/policy" \
  --prompts "$run/world/train.jsonl" --split_prompts --ranker "$run/world/ranker" \
  --eval_prompts "$run/world/heldout.jsonl" --judge examples.demo:rule --evaluate --run_dir "$run" --gpus none "$@"
