#!/usr/bin/env bash
# One iteration's data, over every GPU given: responses, rankings, training set.
#
#   bash scripts/generate.sh --model M --prompt PROMPTS --out_path runs/x/iter1/data
#
# Reads   the model, the prompts, the ranker.
# Writes  <out_path>/responses.parquet, ranking/, train.parquet, test.parquet, each with its manifest; logs beside it.
#         With --org, as the last step, the data sets on the Hub.
# Exit codes: 0 done (also: nothing left to do), 2 wrong use, 130 interrupted, else that of the stage that failed.
set -euo pipefail
usage() {
  cat <<'HELP'
bash scripts/generate.sh --model M --prompt PROMPTS --out_path DIR [flags]
  --model M        Hub id or directory of the policy
  --prompt P       prompts: Hub id, directory, .parquet, .jsonl or .csv (--prompts is the same)
  --out_path DIR   the iteration's data directory
  --pairs K        responses a prompt
  --frac N         prompts in a shard (default: shared evenly)
  --gpus LIST      0,2,5 or auto (default) or none
  --world_size W   GPUs that one model is spread over
  --recipe FILE    YAML with every other setting (default: recipes/sppo/released.yaml)
  --ranker R       preference model (its other settings: --recipe)
  --part I/N       every N-th prompt from the I-th on
  --org ORG        push the data sets to this Hub organisation or user at the end; without it nothing is pushed
  --name NAME      their name on the Hub; one that ends in -iter2 gives them the tag iter2
  --public         let everybody see them
  --logs DIR       where logs go (default: logs beside the data)
  --overwrite      make everything again
HELP
}
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export SPPO_CHILD=1 # killed, this script leaves nothing running
out='' frac=0 gpus=auto world=1 part=0/1 org='' name='' logs=''
recipe=() model=() prompts=() pairs=() ranker=() overwrite=() public=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --overwrite) overwrite=(--overwrite); shift; continue ;;
    --public | --public=*) public=("$1"); shift; continue ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  [ $# -ge 2 ] || { echo "error: $1 needs a value; see --help" >&2; exit 2; }
  case $1 in
    --model) model=(--model "$2") ;;
    --prompt | --prompts) prompts=(--prompts "$2") ;;
    --out_path) out=$2 ;;
    --pairs) pairs=(--pairs "$2") ;;
    --frac) frac=$2 ;;
    --gpus) gpus=$2 ;;
    --world_size) world=$2 ;;
    --recipe) recipe=(--recipe "$2") ;;
    --ranker) ranker=(--ranker "$2") ;;
    --part) part=$2 ;;
    --org) org=$2 ;;
    --name) name=$2 ;;
    --logs) logs=$2 ;;
    *) echo "error: unknown flag $1; see bash scripts/generate.sh --help" >&2; exit 2 ;;
  esac
  shift 2
done
[ -n "$out" ] || { echo "error: --out_path is missing; see bash scripts/generate.sh --help" >&2; exit 2; }
[ -z "$org" ] || [ -n "$name" ] || { echo "error: --org needs --name, the data sets' name on the Hub" >&2; exit 2; }
[ -n "$org" ] || [ ${#public[@]} -eq 0 ] || { echo "error: --public needs --org, where to push to" >&2; exit 2; }
logs=${logs:-$(dirname "$out")/logs}

launch() { # launch NAME WORLD_SIZE COMMAND...: one process a GPU
  "$PYTHON" -m sppo.launch shards --gpus "$gpus" --world_size "$2" --logs "$logs" --name "$1" -- "${@:3}"
}
data=(--output_dir "$out" "${recipe[@]}" "${pairs[@]}" "${overwrite[@]}")
shards=$("$PYTHON" -m sppo.launch count --gpus "$gpus" --world_size "$world")
launch generate "$world" "$PYTHON" "$root/scripts/generate.py" "${data[@]}" "${model[@]}" "${prompts[@]}" \
  --frac_len "$frac" --prompts_part "$part" --world_size "$world"
"$PYTHON" "$root/scripts/combine_generate.py" "${data[@]}" --numgpu "$shards"
"$PYTHON" "$root/scripts/preload.py" --output_dir "$out" "${recipe[@]}" "${ranker[@]}"
launch rank 1 "$PYTHON" "$root/scripts/rank.py" "${data[@]}" "${model[@]}" "${ranker[@]}"
"$PYTHON" "$root/scripts/compute_prob.py" "${data[@]}"
if [ -n "$org" ]; then
  "$PYTHON" "$root/scripts/push_to_hub.py" "${recipe[@]}" "--output_dir=$out" "--org=$org" "--name=$name" "${public[@]}"
fi
