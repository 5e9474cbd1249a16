#!/usr/bin/env bash
# SPPO on SmolLM2-135M-Instruct, on a CPU or any one GPU: it learns to follow instructions that a program can check.
#   bash run_sppo_smollm2.sh [--seed N] [--run_dir DIR] [any flag of run_sppo_mistral.sh]
# Needs Python 3.11 to 3.14, 6 GiB of memory, and the Hub or a package index; makes .venv. Run again, it goes on.
set -euo pipefail
unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=$here/runs/smollm2 seed=42 model=$here/runs/SmolLM2-135M-Instruct help=false dry_run=false
arguments=("$@")
for i in "${!arguments[@]}"; do
  case ${arguments[i]} in
    --run_dir) run=${arguments[i + 1]:-} ;;
    --run_dir=*) run=${arguments[i]#*=} ;;
    --seed) seed=${arguments[i + 1]:-} ;;
    --seed=*) seed=${arguments[i]#*=} ;;
    --model | --model=*) model='' ;;
    --dry_run) dry_run=true ;;
    -h | --help) help=true ;;
  esac
done
if $help && [ ! -x "$here/.venv/bin/python" ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$here/run_sppo_smollm2.sh"
  exit 0
fi
if $dry_run && [ ! -e "$run/prompts/train.jsonl" ]; then
  echo "smollm2: the model and $run/prompts are not made yet; without --dry_run this makes them first"
  exit 0
fi

$help || PYTHON="${PYTHON:-}" bash "$here/scripts/install.sh" vllm
unset PYTHON VIRTUAL_ENV
# shellcheck source=scripts/env.sh
source "$here/scripts/env.sh"
if $help; then exec bash "$root/scripts/run.sh" --help; fi
[ -z "$model" ] || "$PYTHON" "$root/scripts/make_smollm2.py" --output_dir "$model"
"$PYTHON" "$root/scripts/make_instructions.py" --output_dir "$run/prompts" --seed "$seed"
exec bash "$root/scripts/run.sh" --recipe "$root/recipes/sppo/smollm2.yaml" --name smollm2 --model "$model" \
  --prompts "$run/prompts/train.jsonl" --split_prompts --eval_prompts "$run/prompts/heldout.jsonl" --evaluate \
  --run_dir "$run" "$@"
