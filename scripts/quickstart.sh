#!/usr/bin/env bash
# The main job in some six minutes on 2 cores: a small network on real CIFAR-10, clean burn-in, DyART, AutoAttack.
# Makes .venv, fetches the data, trains into experiments/quickstart*, ends with a table and a picture.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 0 ] || {
    echo "quickstart.sh takes no flags, not $1: for other runs there are train.py and eval.py" >&2
    exit 2
}
make_environment
cd "$ROOT"

started=$SECONDS
folder="experiments/quickstart-$(date +%Y%m%d-%H%M%S)"
# bfloat16 halves the training where the processor multiplies in it; elsewhere it takes longer.
precision=none
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bf16; fi
"$PYTHON" train.py --dataset cifar10 --model wrn-10-1-swish --recipe short --train-subset 12800 --epochs 4 \
    --validation-size 256 --validation-attack-iter 10 --attack-eps 4/255 --amp "$precision" \
    --output-dir "$(dirname "$folder")" --name "$(basename "$folder")" --if-exists stop
# The longest attacks first: the shorter ones fill up what is left of the other core.
"$PYTHON" eval.py "$folder" --checkpoint best.pt burn_in.pt --eps 2 4 8 --n 128 --batch-size 128 --version custom \
    --jobs 2
"$PYTHON" scripts/quickstart_report.py "$folder"
echo "$((SECONDS - started)) seconds"
