#!/usr/bin/env bash
# Download and prepare Tiny-ImageNet-200:  bash data/TinyImageNet-200.sh [ZIP] [--data-dir DIR]
# With the official zip as ZIP no network is needed. Run from any directory, and again after an interruption.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
"$PYTHON" -c 'import importlib.util as util, sys; sys.exit(not all(map(util.find_spec, ("torch", "PIL", "tqdm"))))' || {
    echo "error: $PYTHON lacks the packages; run first: $PYTHON -m pip install -r $ROOT/requirements.txt" >&2
    exit 2
}
# In the place of the current directory, whose package named data, if any, must not be taken for ours. (Python 3.10 has
# no PYTHONSAFEPATH.)
exec "$PYTHON" -c 'import sys; sys.path[0] = sys.argv.pop(1); from data.tiny_imagenet import main; sys.exit(main())' \
    "$ROOT" "$@"
