#!/usr/bin/env bash
# Deletes the slice and its queued resource; keeps the bucket.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
parse_arguments "$@"
refuse_arguments
require NAME PROJECT ZONE

tpu queued-resources delete "$NAME" --quiet --force
