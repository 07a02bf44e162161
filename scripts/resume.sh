#!/usr/bin/env bash
# Go on with an experiment where it stopped, to the same result as if it had not.
#     bash scripts/resume.sh FOLDER [flags of train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [ $# -eq 0 ]; then
    echo "which experiment? bash $0 FOLDER" >&2
    exit 2
fi
folder="$1"
shift
keeps --resume --resume_fname "$folder" -- "$@"
train_py --resume "$folder" "$@"
