#!/usr/bin/env bash
# Does this machine do what is promised for a GPU? In at most 8 minutes, without network: the tests that need a GPU;
# what a step costs with and without each option; a short training that is killed and resumed; one process over NCCL;
# an evaluation. Each part has a time limit, and one that fails does not stop the next.
#     bash scripts/check_gpu.sh [DATA] [--device cuda:1] [--output FOLDER] [--parts "tests training"] [--limit SECONDS]
# DATA: where CIFAR-10 lies prepared (train.py's --data-dir); without it, scikit-learn's digits. Outcomes and figures go
# to check-gpu.json in FOLDER (experiments/check-gpu-DATE), beside what each part printed. --device cpu: all of it small.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() {
    echo "usage: bash scripts/check_gpu.sh [DATA] [--device DEVICE] [--output FOLDER] [--parts NAMES] [--limit SECONDS]" >&2
    exit 2
}
DATA="" DEVICE=cuda OUTPUT="$ROOT/experiments/check-gpu-$(date +%Y%m%d-%H%M%S)" PARTS="" LIMIT=480
while [ $# -gt 0 ]; do
    case "$1 $#" in
        --*" 1") usage ;;
        "--device "*) DEVICE="$2" ;;
        "--output "*) OUTPUT="$(realpath -m "$2")" ;;
        "--parts "*) PARTS="$2" ;;
        "--limit "*) LIMIT="$2" ;;
        -*) usage ;;
        *) [ -z "$DATA" ] && DATA="$(realpath -m "$1")" || usage ;;
    esac
    [[ "$1" != --* ]] || shift
    shift
done
[[ "$LIMIT" =~ ^[1-9][0-9]*$ ]] || usage
if [ -n "$DATA" ] && [ ! -e "$DATA/cifar-10/train.npz" ]; then
    echo "$DATA: no cifar-10/train.npz in it, which train.py --data-dir $DATA makes" >&2
    exit 2
fi
if [ -e "$OUTPUT" ]; then
    echo "$OUTPUT exists: a check has a folder of its own" >&2
    exit 2
fi

IMAGES="--dataset digits"
[ -z "$DATA" ] || IMAGES="--dataset cifar10 --data-dir $DATA"
if [ "${DEVICE%%:*}" = cpu ]; then
    BENCH="--smoke --examples 0"
    TRAINING="--model wrn-10-1-swish --train-subset 128 --batch-size 16 --burn-in-batch-size 16 --validation-size 16"
    SYNC="" EVALUATED=8 SLOWER=10
else
    BENCH="$IMAGES --model wrn-28-10-swish --batch-size 64 --rounds 1 --examples 0"
    TRAINING="--model wrn-28-10-swish --train-subset 1024 --batch-size 128 --burn-in-batch-size 128 --validation-size 64"
    SYNC="--sync-batch-norm" EVALUATED=32 SLOWER=1
fi
TRAINING="$IMAGES $TRAINING --burn-in-epochs 1 --epochs 2 --scheduler cyclic --validation-attack-iter 5"
export DATA DEVICE OUTPUT IMAGES BENCH TRAINING SYNC EVALUATED PYTHON ROOT DYART_TEST_DEVICE="$DEVICE"

# --- The parts: each a function, in a shell of its own that stops at the first command that fails ---------------------

tests() {
    "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$OUTPUT/tests/junit.xml" \
        tests/test_gpu.py tests/test_graphs.py
}

bench() { # NAME OF THE PART, FLAGS
    "$PYTHON" bench.py $BENCH --device "$DEVICE" --output "$OUTPUT/$1/bench.json" "${@:2}"
}

training() { # one in one go, and one that is killed after its first epoch
    local flags="$TRAINING --device $DEVICE --output-dir $OUTPUT/training --if-exists stop"
    "$PYTHON" train.py $flags --name whole
    "$PYTHON" train.py $flags --name cut &
    until [ -e "$OUTPUT/training/cut/latest.pt" ]; do
        kill -0 $! 2>/dev/null || wait $!
        sleep 0.05
    done
    kill -9 $!
    wait $! || true
    "$PYTHON" train.py --resume "$OUTPUT/training/cut" --device "$DEVICE"
}

torchrun() { # the training in one go once more: with one process, what several would do
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 \
        train.py $TRAINING $SYNC --device "$DEVICE" --output-dir "$OUTPUT/torchrun" --name whole --if-exists stop
}

evaluation() {
    "$PYTHON" eval.py "$OUTPUT/training/whole" --eps 8 --n "$EVALUATED" --batch-size "$EVALUATED" --version custom \
        --output-dir "$OUTPUT/evaluation" --device "$DEVICE"
}

export -f tests bench training torchrun evaluation

# part NAME SECONDS COMMAND...: runs it, if it is wanted, and writes down how it ended.
part() {
    local name="$1" limit="$(($2 * SLOWER < LIMIT ? $2 * SLOWER : LIMIT))" status=0 started=$SECONDS
    [[ -z "$PARTS" || " $PARTS " == *" $name "* ]] || return 0
    mkdir -p "$OUTPUT/$name"
    echo "$name (at most $limit s)"
    timeout --kill-after=2 "$limit" bash -euo pipefail -c "${*:3}" >"$OUTPUT/$name/output.log" 2>&1 &
    running=$!
    wait "$running" || status=$?
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" "$limit" "${*:3}" >>"$OUTPUT/parts.tsv"
    "$PYTHON" scripts/check_gpu_report.py "$OUTPUT" >/dev/null || true
}
running=""
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM

# --- What is run, for how many seconds at most: 450 in all, and 2 where one has to be killed (a CPU: ten times that) -----

cd "$ROOT"
part tests 50 tests
part bench 35 bench bench
part bench-bf16 30 bench bench-bf16 --amp bf16
part bench-contiguous 35 bench bench-contiguous --channels-last false
part bench-float32 40 bench bench-float32 --tf32 false
[ "${DEVICE%%:*}" = cpu ] || part bench-cuda-graphs 35 bench bench-cuda-graphs --cuda-graphs
part bench-compile 100 bench bench-compile --compile
part training 60 training
part torchrun 35 torchrun
part evaluation 30 evaluation
[ -e "$OUTPUT/parts.tsv" ] || {
    echo "--parts $PARTS: there is no such part" >&2
    exit 2
}
find "$OUTPUT" -name "*.pt" -delete
exec "$PYTHON" scripts/check_gpu_report.py "$OUTPUT"
