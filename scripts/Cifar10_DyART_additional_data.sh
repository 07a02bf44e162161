#!/usr/bin/env bash
# DyART on CIFAR-10 and generated images, from the burn-in of Cifar10_clean_training.sh. The file holds `image` and
# `label`, as published for DDPM and EDM.
#     bash scripts/Cifar10_DyART_additional_data.sh --aux-data-filename FILE.npz [--group-norm] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "$@"
if [ -z "$(given --aux-data-filename --aux-data-filename "$@")" ]; then
    echo "which generated data? bash $0 --aux-data-filename FILE.npz" >&2
    exit 2
fi
dyart Cifar10 cifar10 "$@"
