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
case " $* " in *" --help "*) show_help "$root/scripts/run.sh" scripts/plan.py; exit 0 ;; esac
# killed, this script leaves nothing running; in a run a push may fail (see env.sh), and there is no --overwrite
export SPPO_CHILD=1 SPPO_RUN=1 SPPO_NO_OVERWRITE=1

# Look at everything first: flags, preflight, each iteration's recipe. What is left comes back in a file.
plan=$(mktemp)
doing=''
ended() {
  local code=$?
  rm -f "$plan" ${held:+"$run_dir/.lock.owner"}
  [ -n "$doing" ] || return 0
  if [ "$code" = 130 ] && [ -e "$SPPO_STOP" ]; then
    echo "=== $doing: stopped, as asked; run the same command to go on from here"
  elif [ "$code" != 0 ]; then
    echo "=== $doing: failed; run the same command again to go on from here" >&2
  fi
}
trap ended EXIT
run scripts/plan.py "$@" --plan="$plan"
IFS= read -r run_dir < "$plan" || exit 0 # a dry run, or a job that is submitted

# One run at a time in a directory: the lock lasts as long as this script.
exec 9>> "$run_dir/.lock"
run scripts/hold.py --run_dir="$run_dir"
held=true
SPPO_STOP=${SPPO_STOP:-$(cd "$run_dir" && pwd)/stop}
export SPPO_STOP

step() {
  local began=$SECONDS
  doing=$1
  shift
  printf '\n=== %s\n' "$doing"
  "$@"
  echo "=== $doing: $((SECONDS - began)) s"
}

recipe=''
while IFS= read -r next <&3; do
  recipe=$next
  iteration=$(basename "$(dirname "$recipe")") && iteration="iteration ${iteration#iter}"
  # sourced, so that they are this very process: what they start ends with it
  step "$iteration: generate" source "$root/scripts/generate.sh" --recipe "$recipe"
  step "$iteration: train" source "$root/scripts/pipeline.sh" --recipe "$recipe"
  step "$iteration: report" run scripts/report.py --recipe "$recipe"
done 3< <(tail -n +2 "$plan")
if [ -n "$recipe" ] && grep -q '^evaluate: true' "$recipe"; then
  step "win matrix" run scripts/win_matrix.py --run_dir "$run_dir"
fi
doing=''
run scripts/finish.py --run_dir "$run_dir" # the table, the page, and what is not on the Hub
