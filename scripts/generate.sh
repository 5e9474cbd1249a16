#!/usr/bin/env bash
# One iteration's data, over every GPU given: responses, rankings, training set.
#
#   bash scripts/generate.sh --model M --prompt PROMPTS --out_path runs/x/iter1/data
#
# Reads   the model, the prompts, the ranker.
# Writes  <out_path>/responses.parquet, ranking/, train.parquet, test.parquet, each with its manifest; logs beside it.
#         With --org, as the last step, the data sets on the Hub.
# Exit codes: 0 done (also: nothing left to do), 2 wrong use, 130 interrupted, else that of the stage that failed.
# All flags: bash scripts/generate.sh --help
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export SPPO_CHILD=1 # killed, this script leaves nothing running
declare -a generate_shards generate combine_generate preload rank_shards rank compute_prob push_to_hub
words=$("$PYTHON" -m sppo.launch.chain generate "$@") # reads the flags, and gives each command below its words
eval "$words"

"$PYTHON" "$root/scripts/generate.py" "${generate[@]}" --only_prompts
"$PYTHON" -m sppo.launch shards "${generate_shards[@]}" -- "$PYTHON" "$root/scripts/generate.py" "${generate[@]}"
"$PYTHON" "$root/scripts/combine_generate.py" "${combine_generate[@]}"
"$PYTHON" "$root/scripts/preload.py" "${preload[@]}"
"$PYTHON" -m sppo.launch shards "${rank_shards[@]}" -- "$PYTHON" "$root/scripts/rank.py" "${rank[@]}"
"$PYTHON" "$root/scripts/compute_prob.py" "${compute_prob[@]}"
if [ ${#push_to_hub[@]} -gt 0 ]; then
  "$PYTHON" "$root/scripts/push_to_hub.py" "${push_to_hub[@]}"
fi
