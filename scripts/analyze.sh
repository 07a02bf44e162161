#!/usr/bin/env bash
# The paper's pictures of the decision boundary: of a burn-in's end (natural) and of the best checkpoint of a run.
#   scripts/analyze.sh experiments/NAME [flags of analyze.py, e.g. --examples 300 --check-speeds 100]
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: scripts/analyze.sh FOLDER [flags of analyze.py]}
shift
[ -e "$folder/burn_in.pt" ] &&
    python "$here/analyze.py" "$folder" --checkpoint burn_in.pt --output-dir "$folder/figures/burn_in" "$@"
python "$here/analyze.py" "$folder" "$@"
