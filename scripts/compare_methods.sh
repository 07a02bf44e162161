#!/usr/bin/env bash
# Which method makes the most robust model for the same cost? Every method spends the same passes through the network,
# burn-in included: first three peak rates each on the middle budget, chosen on held-out images, then runs over seeds
# under AutoAttack custom, the leaders' under standard; and a table and a picture. A run a core at a time; what is
# finished is not run again, and what was cut goes on.
#     bash scripts/compare_methods.sh [--budget "9 18 36"] [--seeds "0 1 2"] [--methods "clean at-10 ..."]
#         [--dataset cifar10] [--model wrn-10-1-swish] [--eps 8] [--n 500] [--leaders-n 1000]
#         [--folder experiments/compare-methods] [--output results/compare-methods.json]
#         [--device cpu|cuda] [--train "MORE FLAGS OF train.py"]
# Writes --folder, --output and a picture beside that. Tens of hours of a core, with the defaults.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment
cd "$ROOT"
REPORT=("$PYTHON" scripts/compare_methods_report.py "$@")
"${REPORT[@]}" --todo tuning >/dev/null

# train_and_attack FOLDER FLAGS-OF-TRAIN -- FLAGS-OF-EVAL -- ...
train_and_attack() {
    local folder="$1" words=() first=1
    shift
    for word in "$@" --; do
        if [ "$word" != -- ]; then
            words+=("$word")
            continue
        elif [ "$first" = 1 ]; then
            "$PYTHON" train.py "${words[@]}" --output-dir "$(dirname "$folder")" --name "$(basename "$folder")" \
                --if-exists resume
            "$PYTHON" scripts/compare_methods_report.py --measure "$folder"
        else
            "$PYTHON" eval.py "$folder" "${words[@]}"
        fi
        first=0 words=()
    done
}
export -f train_and_attack
export PYTHON OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

for part in tuning runs leaders; do
    "${REPORT[@]}" --todo "$part" | xargs -d '\n' -P "${JOBS:-$(nproc)}" -I{} bash -euc 'train_and_attack {}'
    "${REPORT[@]}" >/dev/null
done
exec "${REPORT[@]}"
