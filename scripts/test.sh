#!/usr/bin/env bash
# Lint, format and tests, in the environment that quickstart.sh uses; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# A process a core, each with one thread: quicker than one process with many. The last tests go to whoever is idle.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
