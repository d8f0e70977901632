#!/usr/bin/env bash
# Fills in tpu.yaml or gpu.yaml and applies it with kubectl:
# apply.sh tpu|gpu [--dry-run] [options of the program].
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common.sh"
kind=${1:-}
[[ $kind == tpu || $kind == gpu ]] || fail "'$kind': the first argument must be tpu or gpu"
parse_arguments "${@:2}"
common=(NAME IMAGE SERVICE_ACCOUNT BUCKET CONFIG DATA)

chips() { # 2x2x4 -> 16
  local product=$((${TOPOLOGY//x/*}))
  ((product % 4 == 0)) || fail "TOPOLOGY=$TOPOLOGY: must have a multiple of 4 chips, 4 a host"
  echo "$product"
}

if [[ $kind == tpu ]]; then
  require "${common[@]}" TPU TOPOLOGY
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY=$TOPOLOGY: must be like 4x4 or 2x2x2"
  chips=$(chips)
  HOSTS=$((chips / 4))
else
  require "${common[@]}" GPU GPUS_PER_HOST HOSTS
  # JAX does not detect this cluster. JobSet gives its first pod this name.
  # shellcheck disable=SC2016 # Kubernetes expands $(...), not the shell
  arguments+=(
    "--coordinator=$NAME-train-0-0.$NAME:8476" "--num_processes=$HOSTS"
    '--process_id=$(JOB_COMPLETION_INDEX)'
  )
fi

program_arguments "$MOUNT"
# shellcheck disable=SC2034 # fill reads it
ARGUMENTS=$(yaml_list "${arguments[@]}")
names=("${common[@]}" MOUNT HOSTS ARGUMENTS TPU TOPOLOGY GPU GPUS_PER_HOST)
manifest=$(fill "$here/$kind.yaml" "${names[@]}")

if ((dry_run)); then
  printf '%s\n' "$manifest"
fi
run kubectl apply -f - <<< "$manifest"
