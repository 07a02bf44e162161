#!/usr/bin/env bash
# The trainings that a file in results/ asks for, side by side: every variant of its flags with every seed; then clean and
# robust accuracy of each, and the differences at the same seed. A run a core at a time. What the file holds is not run
# again, and what was cut goes on.
#     bash scripts/compare_runs.sh results/compare-searches.json [FOLDER]      writes the file and FOLDER
# scripts/compare_runs_report.py says what such a file has to hold.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] && [ $# -le 2 ] && [[ "$1" != -* ]] || {
    echo "usage: bash scripts/compare_runs.sh FILE.json [FOLDER]" >&2
    exit 2
}
FILE="$(realpath -m "$1")"
FOLDER="$(realpath -m "${2:-$ROOT/experiments/$(basename "$FILE" .json)}")"
[ -e "$FILE" ] || {
    echo "$1: no such file" >&2
    exit 2
}
make_environment
cd "$ROOT"
REPORT=("$PYTHON" scripts/compare_runs_report.py "$FILE" "$FOLDER")
missing="$("${REPORT[@]}" --todo)"
ATTACK="$("${REPORT[@]}" --attack)"

# train_and_measure NAME FLAGS-OF-TRAIN
train_and_measure() {
    local name="$1"
    shift
    "$PYTHON" train.py "$@" --output-dir "$FOLDER" --name "$name" --if-exists resume
    [ -z "$ATTACK" ] || "$PYTHON" eval.py "$FOLDER/$name" $ATTACK
    "$PYTHON" scripts/compare_runs_report.py "$FILE" "$FOLDER" --measure "$name"
}
export -f train_and_measure
export PYTHON FILE FOLDER ATTACK OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo -n "$missing" | xargs -d '\n' -P "${JOBS:-$(nproc)}" -I{} bash -euc 'train_and_measure {}'
exec "${REPORT[@]}"
