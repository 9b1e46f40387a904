#!/usr/bin/env bash
# Stage 4: trains with training/scm_config.py, or another config by --config. See scripts/launch.sh for GPUs and machines.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh" stage4/training/scm_config.py "$@"
