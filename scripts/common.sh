# What the scripts share; source it. Sets ROOT (the repository) and PYTHON (its environment's, where there is one).
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

choose_python() {
    PYTHON="$VENV/bin/python"
    [ -x "$PYTHON" ] || PYTHON="$(command -v python3)" || {
        echo "no Python found: run bash $ROOT/scripts/quickstart.sh, or install python3" >&2
        exit 2
    }
}

# Makes .venv and installs requirements.txt into it, unless these very requirements are installed there already.
make_environment() {
    local wanted base
    wanted="$(sha256sum <"$ROOT/requirements.txt")"
    if [ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]; then
        base="$(command -v python3)" && "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "Python 3.10 or newer is needed, as python3" >&2
            exit 2
        }
        echo "installing requirements.txt into $VENV (some minutes; once)"
        "$base" -m venv "$VENV"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
        echo "$wanted" >"$VENV/installed"
    fi
    choose_python
}

choose_python
