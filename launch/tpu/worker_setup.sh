#!/usr/bin/env bash
# On one worker: mounts the bucket and installs the package. Can be run again.
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
  # A fresh worker may still be installing updates: wait for the lock.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qqy gcsfuse
fi

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
