#!/usr/bin/env bash
# SPPO: iterations of generate, rank, train, each feeding the next. The run_sppo_*.sh call this with their model.
#
#   bash scripts/run.sh --model M --prompts prompts.jsonl --run_dir runs/x --iterations 3 --gpus auto
#
# Reads   the model, the prompts, the ranker, and a recipe with all settings.
# Writes  the run's directory: iter1/recipe.yaml, iter1/data, iter1/model, iter1/logs, iter2/..., report.html, and with
#         --eval_prompts summary.json. With --org the data, and with --push_model the models, are on the Hub too.
# Run again, it goes on where it stopped; `touch <run_dir>/stop` asks it to stop in good order.
# Exit codes: 0 done (also: nothing left to do), 1 not ready, or something could not be pushed (all else is done), 2 wrong
# use, 130 interrupted, else that of the stage that failed.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if asks_for_help "$@"; then show_help "$root/scripts/run.sh" scripts/plan.py; exit 0; fi
# killed, this script leaves nothing running; in a run a push may fail (see env.sh), and there is no --overwrite
export SPPO_CHILD=1 SPPO_RUN=1 SPPO_NO_OVERWRITE=1

# shellcheck disable=SC2059 # the formats are ours
say() { { printf "$@"; } 2> /dev/null || true; } # also where nobody reads what is said
trap : PIPE

# A step of the run: what it does, and how long that took.
doing=''
step() {
  local began=$SECONDS
  doing=$1
  shift
  say '\n=== %s\n' "$doing"
  "$@"
  say '=== %s: %s s\n' "$doing" $((SECONDS - began))
}

plan=$(mktemp)
ended() {
  local code=$?
  rm -f "$plan" ${held:+"$run_dir/.lock.owner"}
  if [ "$code" = 130 ] && [ -e "${SPPO_STOP:-}" ]; then
    say '=== %s: stopped, as asked; run the same command to go on from here\n' "$doing"
  elif [ "$code" != 0 ] && [ -n "$doing" ]; then
    say '=== %s: failed; run the same command again to go on from here\n' "$doing" >&2
  fi
}
trap ended EXIT

# Look at everything first: flags, preflight, each iteration's recipe. What is left comes back in a file: the run's
# directory, a digest of the recipes, and a recipe a line. It is empty after a dry run, and where a job is submitted.
run scripts/plan.py "$@" --plan="$plan"
IFS= read -r run_dir < "$plan" || exit 0

# One run at a time in a directory: the lock lasts as long as this script.
exec 9>> "$run_dir/.lock"
run scripts/hold.py --run_dir="$run_dir" --plan="$plan"
held=true
SPPO_STOP=${SPPO_STOP:-$(cd "$run_dir" && pwd)/stop}
export SPPO_STOP
exec 3< <(tail -n +3 "$plan")

recipe=''
while IFS= read -r next <&3; do
  recipe=$next
  name=$(basename "$(dirname "$recipe")")
  # sourced, so that they are this very process: what they start ends with it
  step "iteration ${name#iter}: generate" source "$root/scripts/generate.sh" --recipe "$recipe"
  step "iteration ${name#iter}: train" source "$root/scripts/pipeline.sh" --recipe "$recipe"
  step "iteration ${name#iter}: report" run scripts/report.py --recipe "$recipe"
  if grep -q '^stop_when: judge' "$recipe" && grep -qs "^  \"stopped_at\": ${name#iter}," "$run_dir/guard.json"; then
    break # it got worse
  fi
done
if [ -n "$recipe" ] && grep -q '^evaluate: true' "$recipe"; then
  step "win matrix" run scripts/win_matrix.py --run_dir "$run_dir"
fi
doing=''
run scripts/finish.py "$@" # the table, the page, and what is not on the Hub
