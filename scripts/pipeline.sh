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
# All flags: bash scripts/pipeline.sh --help
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export SPPO_CHILD=1 # killed, this script leaves nothing running
declare -a train_launch train push_to_hub
words=$("$PYTHON" -m sppo.launch.chain pipeline "$@") # reads the flags, and gives each command below its words
eval "$words"

"$PYTHON" -m sppo.launch train "${train_launch[@]}" -- "${train[@]}"
if [ ${#push_to_hub[@]} -gt 0 ]; then
  "$PYTHON" "$root/scripts/push_to_hub.py" "${push_to_hub[@]}"
fi
