#!/usr/bin/env bash
# The baselines on Tiny-ImageNet: the one that is named, or AT, TRADES and MART one after another.
#     bash scripts/TinyImgNet_baselines.sh [at|trades|mart] [--group-norm] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "$@"
baselines tiny-imagenet "$@"
