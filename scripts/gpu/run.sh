#!/usr/bin/env bash
# Runs `python -m scripts.gpu` where only torch 2.11 is installed: run.sh [arguments of scripts.gpu].
# Packages that the machine lacks are expected in ./site (pip install --target site).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
root=$PWD
export PYTHONPATH="$root/scripts/gpu/torch_2_11:$root/site:$root" PYTHONUNBUFFERED=1 TQDM_DISABLE=1
exec python3 -m scripts.gpu "$@"
