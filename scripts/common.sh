# What the scripts share; source it. Sets ROOT (the repository) and PYTHON (its environment's, where there is one).
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

# Threads that wait for each other sleep instead of spinning: on a machine that others use too, that is several times
# quicker (measured: 5 to 7 times, with four busy processes beside on two cores).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

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
            echo "Python 3.10 to 3.13 is needed, as python3" >&2
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

# Prints the value that the words after $1 and $2 give to the flag of these two spellings: "true" for a flag alone,
# nothing where it is not among them.
given() {
    local name="$1" other="$2" before="" value="" word
    shift 2
    for word; do
        case "$word" in
            "$name" | "$other") value=true ;;
            "$name="* | "$other="*) value="${word#*=}" ;;
            --*) ;;
            *) if [ "$before" = "$name" ] || [ "$before" = "$other" ]; then value="$word"; fi ;;
        esac
        before="$word"
    done
    echo "$value"
}

# keeps "WHAT IS SET" "ANOTHER SPELLING" VALUE... -- WORDS: ends the script where the words give the flag another value
# than those that the script stands for: it would do one thing under the name of another.
keeps() {
    local name="$1" other="$2" allowed=() value
    shift 2
    while [ "$1" != -- ]; do
        allowed+=("$1")
        shift
    done
    shift
    value="$(given "$name" "$other" "$@")"
    [ -z "$value" ] && return
    for word in "${allowed[@]}"; do
        [ "$value" = "$word" ] && return
    done
    echo "$(basename "$0") sets $name itself${allowed[*]:+ (${allowed[*]})}, not $value: leave it out, or call the .py" >&2
    exit 2
}

# From a script's flags: EXPERIMENTS, where experiment folders are made, and VARIANT, "-groupnorm" or nothing.
read_flags() {
    "$PYTHON" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("torch") is None)' || {
        echo "$PYTHON has no torch: install $ROOT/requirements.txt, or run bash $ROOT/scripts/test.sh once" >&2
        exit 2
    }
    EXPERIMENTS="$(given --output-dir --output-dir "$@")"
    EXPERIMENTS="${EXPERIMENTS:-$ROOT/experiments}"
    case "$(given --group-norm --GroupNorm "$@" | tr '[:upper:]' '[:lower:]')" in
        true | yes | 1 | on) VARIANT=-groupnorm ;;
        *) VARIANT= ;;
    esac
}

# Runs train.py on the flags, from wherever the user is: in one process, or with PROCESSES=8 in so many on this machine.
train_py() {
    local processes="${PROCESSES:-1}"
    if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
        echo "PROCESSES=$processes: must be a whole number, at least 1" >&2
        exit 2
    elif [ "$processes" = 1 ]; then
        "$PYTHON" "$ROOT/train.py" "$@"
    else
        local threads=$(($(nproc) / processes))
        OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}" "$PYTHON" -m torch.distributed.run \
            --standalone --nproc-per-node "$processes" "$ROOT/train.py" "$@"
    fi
}

# The same, with experiment folders where read_flags has found that they are made.
train() {
    train_py --output-dir "$EXPERIMENTS" "$@"
}

# burn_in NAME DATASET FLAGS: clean training into NAME-burn-in[-groupnorm], where the DyART scripts look for it.
burn_in() {
    local folder="$1-burn-in$VARIANT" dataset="$2"
    shift 2
    keeps --method --method clean -- "$@"
    if [ -e "$EXPERIMENTS/$folder" ] && [ -z "$(given --name --dry-run "$@")" ] &&
        [ "$(given --if-exists --if-exists "$@")" != resume ]; then
        echo "$EXPERIMENTS/$folder exists: use it, finish it with resume.sh, or make another with --name" >&2
        exit 2
    fi
    train --dataset "$dataset" --method clean --name "$folder" --if-exists stop "$@"
}

# dyart NAME DATASET FLAGS: DyART from the folder that NAME_clean_training.sh made.
dyart() {
    local name="$1" dataset="$2" folder="$EXPERIMENTS/$1-burn-in$VARIANT" command pretrained=()
    shift 2
    keeps --method --method dyart -- "$@"
    if [ -z "$(given --pretrained --burn-in-epochs "$@")" ]; then
        if [ ! -d "$folder" ]; then
            command="bash $ROOT/scripts/${name}_clean_training.sh${VARIANT:+ --group-norm} --output-dir $EXPERIMENTS"
            echo "the burn-in $folder is missing; make it with: $command" >&2
            exit 2
        fi
        pretrained=(--pretrained "$folder")
    fi
    train --dataset "$dataset" --method dyart "${pretrained[@]}" "$@"
}

# baselines DATASET [METHOD] FLAGS: the method, or AT, TRADES and MART one after another.
baselines() {
    local dataset="$1" method methods=(at trades mart)
    shift
    if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
        methods=("$1")
        shift
    fi
    keeps --method --method -- "$@"
    for method in "${methods[@]}"; do
        train --dataset "$dataset" --method "$method" "$@"
    done
}
