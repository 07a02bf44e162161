#!/usr/bin/env bash
# DyART on Tiny-ImageNet, from the burn-in of TinyImgNet_clean_training.sh (same --output-dir and model flags).
#     bash scripts/TinyImgNet_DyART.sh [--group-norm] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "$@"
dyart TinyImgNet tiny-imagenet "$@"
