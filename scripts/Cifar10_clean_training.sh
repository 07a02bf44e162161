#!/usr/bin/env bash
# Burn-in for CIFAR-10: 10 epochs of clean training, into experiments/Cifar10-burn-in[-groupnorm].
#     bash scripts/Cifar10_clean_training.sh [--group-norm] [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_flags "$@"
burn_in Cifar10 cifar10 "$@"
