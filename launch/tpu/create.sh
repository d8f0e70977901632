#!/usr/bin/env bash
# Requests a TPU slice: a queued resource with one node, both named NAME.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
parse_arguments "$@"
refuse_arguments
require NAME PROJECT ZONE ACCELERATOR_TYPE PROVISIONING

case $ACCELERATOR_TYPE in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: must be v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac
case $PROVISIONING in
  spot | reserved) tier=("--$PROVISIONING") ;;
  on-demand) tier=() ;;
  *) fail "PROVISIONING=$PROVISIONING: must be spot, reserved or on-demand" ;;
esac

tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
  --runtime-version="$runtime" "${tier[@]}"
