#!/usr/bin/env bash
# On one worker: mounts the bucket and installs the package. Can be run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh
require BUCKET

install_gcsfuse
options=(
  --implicit-dirs # folders made by other tools have no entry
  # A checkpoint is committed by renaming a folder, which the default limit prevents.
  --rename-dir-limit=200000
  # Metadata is not cached: workers must see at once what another one wrote.
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0
  # Content is cached on disk, because records are read in random order.
  --cache-dir="$HOME/gcsfuse_cache" --file-cache-max-size-mb=40000
  --file-cache-cache-file-for-range-read
)
sudo mkdir -p "$MOUNT"
if ! mountpoint -q "$MOUNT"; then
  sudo chown "$(id -un)" "$MOUNT"
  gcsfuse "${options[@]}" "$BUCKET" "$MOUNT"
fi

python3 -m pip install --quiet --user uv # the worker's own Python is 3.10
python3 -m uv venv --quiet --allow-existing --seed --python 3.11 .venv
.venv/bin/python -m pip install --quiet -e '.[tpu]' -c constraints.txt
