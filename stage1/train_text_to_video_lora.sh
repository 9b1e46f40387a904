#!/usr/bin/env bash
# Stage 1: trains with training/lora_config.py, or another config by --config. See scripts/launch.sh for GPUs and machines.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh" stage1/training/lora_config.py "$@"
