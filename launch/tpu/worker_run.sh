#!/usr/bin/env bash
# On one worker: worker_run.sh ATTEMPT COMMAND... runs the command independently of the
# connection, prints its output and exits with its status. If the connection breaks, gcloud or the
# user runs this line again, which must attach to the running program: only one can use the chips.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
attempt=$1
shift
state=$HOME/xclip_jax_run
mkdir -p "$state"

is_running() { kill -0 "$(cat "$state/pid")" 2> /dev/null; }

start() {
  rm -f "$state/status"
  : > "$state/log" # before tail starts
  echo "$attempt" > "$state/attempt"
  # At shutdown every process receives SIGTERM. The trap keeps the outer shell alive until the
  # program has saved; unlike an ignored signal, a trap is not inherited by the program.
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
  echo "following attempt $(cat "$state/attempt"), which is still running" >&2
elif [[ $(cat "$state/attempt") != "$attempt" ]]; then
  start "$@"
fi
tail --pid="$(cat "$state/pid")" --lines=+1 --follow "$state/log"
exit "$(cat "$state/status")"
