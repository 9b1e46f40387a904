#!/usr/bin/env bash
# Lint and all tests that run on a CPU, in the environment that quickstart.sh uses. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
need_environment scripts/requirements-dev.txt

ruff check .
ruff format --check .
# One process a core, one thread a process: the models are tiny. Long tests first would be best; loadfile keeps the
# fixtures of a file in one process.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile --durations 15 -m "not gpu" "$@"
