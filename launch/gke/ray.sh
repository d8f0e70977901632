#!/usr/bin/env bash
# Fills in ray_index.yaml or ray_serve.yaml and applies it with kubectl:
# ray.sh index|serve [--dry-run] [options of the command].
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common.sh"
kind=${1:-}
[[ $kind == index || $kind == serve ]] ||
  fail "'$kind': the first argument must be index or serve"
parse_arguments "${@:2}"
names=(NAME IMAGE SERVICE_ACCOUNT BUCKET MODEL INDEX)
# shellcheck disable=SC2034 # fill reads them
CPUS=${CPUS:-4} MEMORY=${MEMORY:-16Gi} # of a worker or shard

if [[ $kind == index ]]; then
  require "${names[@]}" VIDEOS WORKERS
  search_command index "gs://$BUCKET/$INDEX" python
  # shellcheck disable=SC2034 # fill reads it
  COMMAND=$(yaml_list "$(printf '%q ' "${program[@]}")")
else
  require "${names[@]}" SHARDS
  arguments=(--ray=auto --host=0.0.0.0 --port=7870 "${arguments[@]}")
  search_command serve "gs://$BUCKET/$INDEX" python
  # shellcheck disable=SC2034 # fill reads it
  ARGUMENTS=$(yaml_list "${program[@]}")
fi

manifest=$(fill "$here/ray_$kind.yaml" "${names[@]}" MOUNT WORKERS SHARDS CPUS MEMORY \
  COMMAND ARGUMENTS)
if ((dry_run)); then
  printf '%s\n' "$manifest"
fi
run kubectl apply -f - <<< "$manifest"
