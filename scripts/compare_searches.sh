#!/usr/bin/env bash
# Does the fast boundary search train as good a model as the released one? From one burn-in (that of quickstart.sh, say),
# DyART with --search fast and with --search fab: the same seeds, the same 50 steps of 64 images; then AutoAttack at 4/255.
#     bash scripts/compare_searches.sh BURN-IN [FOLDER] [SEEDS]        writes FOLDER and results/compare-searches.json
# Some twenty minutes on 2 cores. A run that is finished is not repeated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || {
    echo "usage: bash scripts/compare_searches.sh BURN-IN [FOLDER] [SEEDS], e.g. experiments/quickstart-*/burn_in.pt" >&2
    exit 2
}
burn_in="$(realpath "$1")"
folder="$(realpath -m "${2:-$ROOT/experiments/compare-searches}")"
cd "$ROOT"

for seed in ${3:-0 1 2}; do
    for search in fast fab; do
        run="$search-$seed"
        [ -e "$folder/$run/best.pt" ] || "$PYTHON" train.py --dataset cifar10 --model wrn-10-1-swish --channels-last \
            --pretrained "$burn_in" --search "$search" --seed "$seed" \
            --train-subset 3200 --batch-size 64 --epochs 1 --scheduler cyclic \
            --validation-size 128 --validation-attack-iter 1 --output-dir "$folder" --name "$run" --if-exists stop
        "$PYTHON" eval.py "$folder/$run" --eps 4 --n 128 --batch-size 128 --version custom
    done
done
exec "$PYTHON" scripts/compare_searches_report.py "$folder" results/compare-searches.json
