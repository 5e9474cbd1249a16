#!/usr/bin/env bash
# One iteration's training: $DATA -> $MODEL, over every GPU given.
#
#   bash scripts/pipeline.sh --model M --iter 1 --dataset runs/x/iter1/data --output_dir runs/x/iter1/model --num 1
#
# Reads   the policy and the data set (a $DATA directory, a train.parquet, or a Hub id).
# Writes  <output_dir>, which appears when the model is whole; logs beside it. With --push_model, then, the model on the
#         Hub.
# Exit codes: 0 done (also: nothing left to do), 1 failed (also: the model is whole but could not be pushed; it says what
# to run), 2 wrong use, 130 interrupted.
set -euo pipefail
usage() {
  cat <<'HELP'
bash scripts/pipeline.sh --model M --dataset D --output_dir DIR [flags]
  --model M              Hub id or directory of the policy to start from
  --dataset D            data directory, train.parquet or Hub id
  --output_dir DIR       where the trained model appears
  --iter I               the iteration's number
  --num N                epochs
  --use_peft             train a LoRA adapter; --merge_adapter adds a merged copy, --load_in_4bit is QLoRA
  --learning_rate, --beta, --optim, --loss_type
  --batch_size N         pairs in one forward pass of one process
  --accumulate N         accumulation steps (default: derived from the recipe's global batch)
  --gpus LIST            0,2,5 or auto (default) or none
  --accelerate_config C  a YAML, or a name in recipes/accelerate_configs (default: cpu, one_gpu or zero3);
                         without GPUs it also says how many processes there are
  --recipe FILE          YAML with every other setting (default: recipes/sppo/released.yaml)
  --logs DIR             where logs go (default: logs beside the model)
  --push_model           push the model to <org>/<name> on the Hub at the end: --org ORG --name NAME [--public]
  --overwrite            train again although the directory holds another run's model
Any other --key value goes to sppo/run_sppo.py, whose --help names them all.
HELP
}
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
gpus=auto config='' logs='' output='' org='' name='' push='' public=() arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --overwrite) arguments+=(--overwrite); shift; continue ;;
    --push_model) push=yes; shift; continue ;;
    --public | --public=*) public=("$1"); shift; continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --*) ;;
    *) echo "error: $1 is not a flag; see bash scripts/pipeline.sh --help" >&2; exit 2 ;;
  esac
  if [ $# -lt 2 ] || [[ $2 == --* ]]; then # no value: a switch, or an error that run_sppo.py explains
    arguments+=("$1"); shift; continue
  fi
  case $1 in
    --gpus) gpus=$2 ;;
    --accelerate_config) config=$2 ;;
    --logs) logs=$2 ;;
    --num) arguments+=("--num_train_epochs=$2") ;;
    --output_dir) output=$2 ;;
    --org) org=$2 ;;
    --name) name=$2 ;;
    *) arguments+=("$1=$2") ;;
  esac
  shift 2
done
[ -n "$output" ] || { echo "error: --output_dir is missing; see bash scripts/pipeline.sh --help" >&2; exit 2; }
if [ -z "$push" ] && [ -n "$org$name${public[*]}" ]; then
  echo "error: --org, --name and --public are for --push_model" >&2; exit 2
elif [ -n "$push" ] && { [ -z "$org" ] || [ -z "$name" ]; }; then
  echo "error: --push_model needs --org and --name, where to push to" >&2; exit 2
fi
logs=${logs:-$(dirname "$output")/logs}
train=("$PYTHON" -m sppo.launch train --gpus "$gpus" --accelerate_config "$config" --logs "$logs" --
  "--output_dir=$output" "${arguments[@]}")
[ -n "$push" ] || exec "${train[@]}"
"${train[@]}"
exec "$PYTHON" "$root/scripts/push_to_hub.py" "--model_dir=$output" "--org=$org" "--name=$name" "${public[@]}"
