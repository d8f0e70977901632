#!/usr/bin/env bash
# On one worker: worker_run.sh ATTEMPT COMMAND... runs the command apart from the connection,
# follows it and ends with its status. When a connection breaks, gcloud runs this line again; a user
# may come back too. Both must meet the program that is there: two would fight for the chips.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
attempt=$1
shift
state=$HOME/xclip_jax_run
mkdir -p "$state"

is_running() { kill -0 "$(cat "$state/pid")" 2> /dev/null; }

start() {
  rm -f "$state/status"
  : > "$state/log" # here, not by the shell in the background: tail must find it
  echo "$attempt" > "$state/attempt"
  # A worker that is shut down gives everyone SIGTERM. The trap keeps the outer shell alive until
  # the program has saved, and unlike ignoring the signal is not inherited by it.
  # shellcheck disable=SC2016 # the inner shell expands
  PATH=$PWD/.venv/bin:$PATH setsid bash -c '
    trap : TERM
    state=$1 && shift
    status=0
    "$@" || status=$?
    echo "$status" > "$state/status"
    mkdir -p "$LOGS" && cp "$state/log" "$LOGS/$(cat "$state/attempt")-$(hostname).log"
  ' worker_run "$state" "$@" >> "$state/log" 2>&1 < /dev/null &
  echo $! > "$state/pid"
}

if [[ ! -f $state/pid ]]; then
  start "$@"
elif is_running; then
  echo "following attempt $(cat "$state/attempt"), which still runs" >&2
elif [[ $(cat "$state/attempt") != "$attempt" ]]; then
  start "$@"
fi
tail --pid="$(cat "$state/pid")" --lines=+1 --follow "$state/log"
exit "$(cat "$state/status")"
