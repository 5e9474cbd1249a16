# Sourced by every bash script here: `root`, the Python to use, the library on its path, and how commands are run.
# shellcheck shell=bash
unset CDPATH # with it, `cd` says where it went, and may go elsewhere
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    PYTHON=$root/.venv/bin/python # what scripts/install.sh made
  elif command -v python > /dev/null; then
    PYTHON=python
  else
    PYTHON=python3
  fi
fi

# No file of the current directory runs as a module: `python -m` looks there first, and so does Python for an empty entry
# of PYTHONPATH.
PYTHONPATH=:${PYTHONPATH:-}:
while [[ $PYTHONPATH == *::* ]]; do PYTHONPATH=${PYTHONPATH//::/:}; done
[[ $PYTHONPATH == ":$root:"* ]] || PYTHONPATH=:$root$PYTHONPATH
PYTHONPATH=${PYTHONPATH#:} PYTHONPATH=${PYTHONPATH%:} PYTHONSAFEPATH=1
export PYTHON PYTHONPATH PYTHONSAFEPATH

trap 'exit 130' INT TERM
# A Python script of this project, to its end. bash hears a signal only when the command before it has ended, so the
# script is waited for in the background, and a signal to bash ends it in good order.
run() {
  local script=$1 command code heard=true signalled=false
  shift
  SPPO_PARENT=$$ "$PYTHON" "$root/$script" "$@" &
  command=$!
  trap 'heard=true signalled=true; kill -TERM "$command" 2> /dev/null || true' INT TERM
  while $heard; do
    heard=false code=0
    wait "$command" || code=$?
  done
  trap 'exit 130' INT TERM
  if $signalled && [ "$code" = 143 ]; then code=130; fi # it had not come so far as to hear it
  return "$code"
}

# A push that fails ends a script by hand. It does not end a run, which names at its end what is not on the Hub.
unless_in_a_run() { [ "$1" = 1 ] && [ -n "${SPPO_RUN:-}" ] || return "$1"; }

asks_for_help() {
  local word
  for word in "$@"; do
    case $word in -h | --help) return 0 ;; esac
  done
  return 1
}

# --help of a bash script: the comment at its top, and the flags of the Python script that reads them.
show_help() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$1"
  echo
  "$PYTHON" "$root/$2" --help | sed -n -e 's/^settings that other scripts read.*/further settings:/' -e '/^options:/,$p'
}
