#!/usr/bin/env bash
# A live world in the browser, driven by the keyboard.
#
#   bash scripts/play.sh [--model_path DIR] [server options]
#
# Without a model of stage 3 or 4 to play it takes the mini world's: the shipped weights, else what quickstart.sh trained.
# `bash scripts/play.sh --help` lists the options; --host and --token let other machines in.
set -euo pipefail
# need_environment goes to the root; paths on the command line are relative to where it was called.
called_from="$PWD"
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
need_environment
root="$PWD"

arguments=("$@")
if [[ " $* " != *" --model_path"[\ =]* && " $* " != *" --help "* && " $* " != *" -h "* ]]; then
    model=""
    for candidate in data/miniworld/weights/stage4 outputs/miniworld/stage4; do
        if [[ -f "$candidate/model_index.json" ]]; then
            model="$root/$candidate"
            break
        fi
    done
    if [[ -z "$model" ]]; then
        echo "error: there is no mini-world model to play yet: run bash scripts/quickstart.sh, or give --model_path DIR" >&2
        exit 2
    fi
    arguments=(--model_path "$model" "$@")
fi

cd "$called_from"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m common.serving.server "${arguments[@]}"
