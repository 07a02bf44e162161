#!/usr/bin/env bash
# The paper's pictures of the decision boundary: of the end of the burn-in, where the run had one, and of its best
# checkpoint. Into FOLDER/figures/burn_in and FOLDER/figures, or with --output-dir DIR into DIR/burn_in and DIR. With
# --direction step, which is of latest.pt, into the latter only.
#     bash scripts/analyze.sh FOLDER [FLAGS OF analyze.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || {
    echo "usage: bash scripts/analyze.sh FOLDER [FLAGS OF analyze.py]" >&2
    exit 2
}
folder="$1"
if [[ "$folder" == -* ]] || [ -f "$folder" ]; then # --toy, --help, a bare file: there is one picture
    exec "$PYTHON" "$ROOT/analyze.py" "$@"
fi
shift
keeps --checkpoint --checkpoint -- "$@"
figures="$(given --output-dir --output-dir "$@")"
figures="${figures:-$folder/figures}"
if [ -e "$folder/burn_in.pt" ] && [ "$(given --direction --direction "$@")" != step ]; then
    "$PYTHON" "$ROOT/analyze.py" "$folder" "$@" --checkpoint burn_in.pt --output-dir "$figures/burn_in"
fi
exec "$PYTHON" "$ROOT/analyze.py" "$folder" "$@" --output-dir "$figures"
