#!/usr/bin/env bash
# DyART on CIFAR-10, from the burn-in of Cifar10_clean_training.sh (give both the same --output-dir and model flags).
#     bash scripts/Cifar10_DyART.sh [--group-norm] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "$@"
dyart Cifar10 cifar10 "$@"
