#!/usr/bin/env bash
# Installs the last commit on every worker and mounts the bucket there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common.sh"
parse_arguments "$@"
refuse_arguments
require NAME PROJECT ZONE BUCKET

# Sends a commit, not the folder: the same code on all workers and after restarts, and no data.
git -C "$here" diff --quiet HEAD || echo "note: uncommitted changes are not sent" >&2
archive=${TMPDIR:-/tmp}/$NAME.tar.gz
run git -C "$here/../.." archive --output="$archive" HEAD
tpu tpu-vm scp "$archive" "$NAME:xclip_jax.tar.gz" --worker=all
run rm -f "$archive"

on_workers bash -c "mkdir -p xclip_jax && tar -xzf xclip_jax.tar.gz -C xclip_jax"
on_workers env "BUCKET=$BUCKET" "MOUNT=$MOUNT" bash xclip_jax/launch/tpu/worker_setup.sh
