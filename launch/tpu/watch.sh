#!/usr/bin/env bash
# A complete run: requests a slice, trains on it, replaces it after preemption and deletes it at the
# end. A restarted watch.sh continues with the existing slice.
# Options other than --dry-run are passed to the program.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common.sh"
parse_arguments "$@"
require NAME PROJECT ZONE ACCELERATOR_TYPE PROVISIONING BUCKET CONFIG DATA
MAX_FAILURES=${MAX_FAILURES:-5} PAUSE_SECONDS=${PAUSE_SECONDS:-60} POLL_SECONDS=${POLL_SECONDS:-30}
readonly PREEMPTED=75 CONNECTION_LOST=255
failures=0 # consecutive ones; a successful setup resets the count

log() { echo "watch: $*" >&2; }

describe() { tpu queued-resources describe "$NAME" --format='value(state.state)'; }

slice_state() { # of the queued resource; NONE: missing; UNKNOWN: request failed
  local errors
  errors=$(mktemp)
  if ! describe 2> "$errors"; then
    cat "$errors" >&2
    if grep -q NOT_FOUND "$errors"; then echo NONE; else echo UNKNOWN; fi
  fi
  rm "$errors"
}

failed() {
  failures=$((failures + 1))
  log "$1 failed, $failures in a row of at most $MAX_FAILURES"
  ((failures < MAX_FAILURES)) || exit 1
  sleep "$PAUSE_SECONDS"
}

delete() { "$here/teardown.sh" || failed deletion; }

train() { # sets status
  status=0
  "$here/setup.sh" || status=$?
  if ((status == CONNECTION_LOST)); then
    failed "setting up"
  elif ((status == 0)); then
    failures=0
    "$here/run.sh" "${arguments[@]}" || status=$?
  fi
}

finish() {
  log "done"
  [[ ${KEEP:-0} == 1 ]] || "$here/teardown.sh"
  exit 0
}

use_slice() {
  train
  case $status in
    0) finish ;;
    "$PREEMPTED") delete ;;
    "$CONNECTION_LOST") sleep "$POLL_SECONDS" ;; # the program may still run: check the state
    *) # If a worker dies the others fail with any status: check the slice first.
      sleep "$POLL_SECONDS"
      if [[ $(slice_state) == ACTIVE ]]; then
        log "status $status; the slice is kept and costs money until launch/tpu/teardown.sh"
        exit "$status"
      fi
      ;;
  esac
}

if ((dry_run)); then
  "$here/create.sh" --dry-run
  describe
  "$here/setup.sh" --dry-run
  "$here/run.sh" --dry-run "${arguments[@]}"
  "$here/teardown.sh" --dry-run
  exit 0
fi

while true; do
  state=$(slice_state)
  log "$(date '+%F %T') $state"
  case $state in
    NONE) "$here/create.sh" || failed creation ;;
    ACTIVE) use_slice ;;
    SUSPENDED) delete ;;
    FAILED)
      delete
      failed creation
      ;;
    UNKNOWN) failed "asking for the state" ;;
    *) sleep "$POLL_SECONDS" ;;
  esac
done
