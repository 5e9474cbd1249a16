#!/usr/bin/env bash
# One iteration's data, over every GPU given: responses, rankings, training set.
#
#   bash scripts/generate.sh --model M --prompt PROMPTS --out_path runs/x/iter1/data
#   bash scripts/generate.sh --recipe runs/x/iter2/recipe.yaml
#
# Reads   the model, the prompts, the ranker.
# Writes  <out_path>/responses.parquet, ranking/, train.parquet, test.parquet, each with its manifest; logs beside it.
#         With --org, as the last step, the data sets on the Hub.
# Exit codes: 0 done (also: nothing left to do), 2 wrong use, 130 interrupted, else that of the stage that failed.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if asks_for_help "$@"; then show_help "$root/scripts/generate.sh" scripts/generate.py; exit 0; fi
export SPPO_CHILD=1 # killed, this script leaves nothing running

run scripts/generate.py "$@" --only_prompts             # the flags, the prompts and what is here, before any shard
run scripts/launch.py scripts/generate.py "$@"          # K responses a prompt: one process a GPU, or on a cluster
run scripts/combine_generate.py "$@"                    # -> responses.parquet
run scripts/preload.py "$@"                             # the ranker, once, before all shards want it
run scripts/launch.py scripts/rank.py "$@"              # the logit of every ordered pair: one process a GPU
run scripts/compute_prob.py "$@"                        # win rates -> train.parquet, test.parquet
run scripts/push_to_hub.py --what=data "$@" || unless_in_a_run $? # nothing without --org
