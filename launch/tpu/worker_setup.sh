#!/usr/bin/env bash
# On one worker: mounts the bucket and installs the package. Harmless when run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh
require BUCKET

if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  # A fresh worker is often still busy with its own updates: wait for the lock.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qqy gcsfuse
fi

options=(
  --implicit-dirs # folders that other tools made have no entry of their own
  # Checkpoints become visible by renaming a folder; the default limit refuses that.
  --rename-dir-limit=200000
  # Workers must see at once what another has written, so nothing about files is remembered ...
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0
  # ... but what has been read of them is kept on the disk: records are read in random order.
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
