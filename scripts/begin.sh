# Sourced by run_sppo_demo.sh and run_sppo_smollm2.sh, which make their world before the run: reads the flags that decide
# it, makes .venv with the $packages of install.sh, and sources env.sh. `made`: a file of the world, below $run.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # what it is told, and what it tells, is in the scripts that source it
unset CDPATH
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=$here/runs/$name seed=42 has_model=false help=false dry_run=false
arguments=("$@")
for i in "${!arguments[@]}"; do
  case ${arguments[i]} in
    --run_dir) run=${arguments[i + 1]:-} ;;
    --run_dir=*) run=${arguments[i]#*=} ;;
    --seed) seed=${arguments[i + 1]:-} ;;
    --seed=*) seed=${arguments[i]#*=} ;;
    --model | --model=*) has_model=true ;;
    --dry_run) dry_run=true ;;
    -h | --help) help=true ;;
  esac
done
if $help && [ ! -x "$here/.venv/bin/python" ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$here/run_sppo_$name.sh"
  exit 0
fi
if $dry_run && [ ! -e "$run/$made" ]; then
  echo "$name: $run/${made%/*} is not made yet; without --dry_run this makes all that the run needs first"
  exit 0
fi

$help || PYTHON="${PYTHON:-}" bash "$here/scripts/install.sh" "$packages"
unset PYTHON VIRTUAL_ENV
# shellcheck source=scripts/env.sh
source "$here/scripts/env.sh"
if $help; then exec bash "$root/scripts/run.sh" --help; fi
