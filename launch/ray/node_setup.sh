#!/usr/bin/env bash
# On one machine of a cluster: mounts the bucket read-only and installs the package.
# Can be run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/common.sh
require CLOUD BUCKET EXTRAS

if [[ $CLOUD == gcp ]]; then
  install_gcsfuse
  mount=(gcsfuse --implicit-dirs -o ro)
else
  if ! command -v mount-s3 > /dev/null; then
    package=https://s3.amazonaws.com/mountpoint-s3-release/latest/x86_64/mount-s3.deb
    curl -fsSL --output /tmp/mount-s3.deb "$package"
    # A fresh machine may still be installing updates: wait for the lock.
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=600 install -qqy /tmp/mount-s3.deb
  fi
  mount=(mount-s3 --read-only)
fi
sudo mkdir -p "$MOUNT"
if ! mountpoint -q "$MOUNT"; then
  sudo chown "$(id -un)" "$MOUNT"
  "${mount[@]}" "$BUCKET" "$MOUNT"
fi

if ! python3 -m pip --version > /dev/null 2>&1; then
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qqy python3-pip
fi
python3 -m pip install --quiet --user uv # Ubuntu 22.04 has Python 3.10
python3 -m uv venv --quiet --allow-existing --seed --python 3.11 "$HOME/venv"
"$HOME/venv/bin/python" -m pip install --quiet ".[$EXTRAS]" -c constraints.txt
