#!/usr/bin/env bash
# One iteration's training: $DATA -> $MODEL, over every GPU given.
#
#   bash scripts/pipeline.sh --model M --iter 1 --dataset runs/x/iter1/data --output_dir runs/x/iter1/model --num 1
#   bash scripts/pipeline.sh --recipe runs/x/iter2/recipe.yaml
#
# Reads   the policy and the data set (a $DATA directory, a train.parquet, or a Hub id).
# Writes  <output_dir>, which appears when the model is whole; logs beside it. With --push_model, then, the model on the
#         Hub.
# Exit codes: 0 done (also: nothing left to do), 1 failed (also: the model is whole but could not be pushed; it says what
# to run), 2 wrong use, 130 interrupted.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if asks_for_help "$@"; then show_help "$root/scripts/pipeline.sh" sppo/run_sppo.py; exit 0; fi
export SPPO_CHILD=1 # killed, this script leaves nothing running

run scripts/launch.py sppo/run_sppo.py "$@" # accelerate launch
run scripts/push_to_hub.py --what=model "$@" || unless_in_a_run $? # nothing without --push_model
