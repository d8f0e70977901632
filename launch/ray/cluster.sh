#!/usr/bin/env bash
# A cluster of Ray on machines of a cloud, by Ray's cluster launcher:
# cluster.sh gcp|aws up|index|serve|down [--dry-run] [options of index or serve].
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common.sh"
cloud=${1:-} action=${2:-}
[[ $cloud == gcp || $cloud == aws ]] || fail "'$cloud': the first argument must be gcp or aws"
[[ $action =~ ^(up|index|serve|down)$ ]] ||
  fail "'$action': the second argument must be up, index, serve or down"
parse_arguments "${@:3}"
needed=(NAME ZONE BUCKET IMAGE MACHINE CPUS)
[[ $cloud == aws ]] && needed+=(HEAD_PROFILE PROFILE) || needed+=(PROJECT SERVICE_ACCOUNT)
case $action in
  index) needed+=(MODEL INDEX VIDEOS) ;;
  serve) needed+=(MODEL INDEX SHARDS) ;;
esac
require "${needed[@]}"
home=/home/ubuntu
# fill reads these.
EXTRAS=${EXTRAS:-ray} WORKERS=${WORKERS:-0} SERVERS=${SERVERS:-0}
ARCHIVE=${TMPDIR:-/tmp}/$NAME.tar.gz
# shellcheck disable=SC2034
[[ $cloud == aws ]] && REGION=${ZONE%?} scheme=s3 || REGION=${ZONE%-*} scheme=gs
file=${TMPDIR:-/tmp}/$NAME.yaml # the launcher finds the cluster by the name in it

cluster=$(fill "$here/$cloud.yaml" "${needed[@]}" MOUNT EXTRAS WORKERS SERVERS ARCHIVE REGION)
if ((dry_run)); then
  printf '%s\n' "$cluster"
else
  printf '%s\n' "$cluster" > "$file"
fi

on_head() { # every word is quoted for the head's shell
  run ray exec "$file" "$(printf '%q ' "$@")"
}

submit() { # a job, with further options of `ray job submit` before --
  on_head "$home/venv/bin/ray" job submit --address=http://127.0.0.1:8265 "$@"
}

case $action in
  up)
    refuse_arguments
    # Sends a commit, not the folder: the same code on all machines, and no data.
    git -C "$here" diff --quiet HEAD || echo "note: uncommitted changes are not sent" >&2
    run git -C "$here/../.." archive --output="$ARCHIVE" HEAD
    run ray up "$file" --yes
    ;;
  index) # a lost connection does not end the job
    search_command index "$scheme://$BUCKET/$INDEX" "$home/venv/bin/python"
    submit -- "${program[@]}"
    ;;
  serve) # on the head, reachable through SSH only
    arguments=(--ray=auto --port=7870 "${arguments[@]}")
    search_command serve "$scheme://$BUCKET/$INDEX" "$home/venv/bin/python"
    submit --no-wait --submission-id="$NAME-serve" -- "${program[@]}"
    run ray attach "$file" --port-forward=7870
    ;;
  down)
    refuse_arguments
    run ray down "$file" --yes
    ;;
esac
