#!/usr/bin/env bash
# Runs the program on every worker, prints its output and exits with its status.
# Options other than --dry-run are passed to the program.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
parse_arguments "$@"
require NAME PROJECT ZONE CONFIG DATA

program_command "$MOUNT"
on_workers env "LOGS=$MOUNT/logs/$NAME" bash xclip_jax/launch/tpu/worker_run.sh "$(date +%s)" \
  "${program[@]}"
