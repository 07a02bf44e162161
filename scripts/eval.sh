#!/usr/bin/env bash
# The paper's evaluation: AutoAttack at 2, 4, 8, 12 and 16 /255 (ℓ∞; for a run in ℓ2 at 0.25, 0.5, 0.75 and 1) on the
# whole test set.
#     bash scripts/eval.sh FOLDER [FLAGS OF eval.py]        -v custom leaves Square out, as the released code did
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || {
    echo "usage: bash scripts/eval.sh FOLDER [FLAGS OF eval.py]" >&2
    exit 2
}
exec "$PYTHON" "$ROOT/eval.py" "$1" --eps paper "${@:2}"
