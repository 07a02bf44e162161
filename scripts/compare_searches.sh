#!/usr/bin/env bash
# Does the cheap search of training make as good a model as the ones that stand alone? From one burn-in (that of the
# quickstart, by default), DyART with each --search: the same seeds, the same 100 steps of 64 images; then AutoAttack at
# 4/255 and 8/255. A run a core at a time.
#     bash scripts/compare_searches.sh [BURN-IN] [FOLDER] [SEEDS]        writes FOLDER and results/compare-searches.json
# An hour or two on 2 cores. What is finished in either is not run again; remove the folder of a run that is cut.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -le 3 ] && [[ "${1:-}" != -* ]] || {
    echo "usage: bash scripts/compare_searches.sh [BURN-IN] [FOLDER] [SEEDS]" >&2
    exit 2
}
BURN_IN="$(realpath "${1:-$ROOT/results/compare-searches-burn-in.pt}")"
FOLDER="$(realpath -m "${2:-$ROOT/experiments/compare-searches}")"
make_environment
cd "$ROOT"
REPORT=("$PYTHON" scripts/compare_searches_report.py "$BURN_IN" "$FOLDER" results/compare-searches.json)
missing="$("${REPORT[@]}" "${3:-0 1 2 3 4 5}")"

# train_and_attack SEARCH-SEED
train_and_attack() {
    [ -e "$FOLDER/$1/best.pt" ] || "$PYTHON" train.py --dataset cifar10 --model wrn-10-1-swish \
        --pretrained "$BURN_IN" --search "${1%-*}" --seed "${1#*-}" \
        --train-subset 6400 --batch-size 64 --epochs 1 --scheduler cyclic \
        --validation-size 128 --validation-attack-iter 1 --output-dir "$FOLDER" --name "$1" --if-exists stop
    "$PYTHON" eval.py "$FOLDER/$1" --eps 4 8 --n 256 --batch-size 128 --version custom
    "$PYTHON" scripts/compare_searches_report.py "$BURN_IN" "$FOLDER" results/compare-searches.json >/dev/null
}
export -f train_and_attack
export PYTHON BURN_IN FOLDER OMP_NUM_THREADS=1

echo -n "$missing" | xargs -P "$(nproc)" -I{} bash -euc 'train_and_attack {}'
exec "${REPORT[@]}"
