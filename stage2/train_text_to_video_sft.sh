#!/usr/bin/env bash
# Stage 2: trains with training/sft_config.py, or another config by --config. See scripts/launch.sh for GPUs and machines.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh" stage2/training/sft_config.py "$@"
