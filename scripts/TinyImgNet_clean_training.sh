#!/usr/bin/env bash
# Burn-in for Tiny-ImageNet: 20 epochs of clean training, into experiments/TinyImgNet-burn-in[-groupnorm].
#     bash scripts/TinyImgNet_clean_training.sh [--group-norm] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "$@"
burn_in TinyImgNet tiny-imagenet "$@"
