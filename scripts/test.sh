#!/usr/bin/env bash
# Lint and all tests that run on a CPU, in the environment that quickstart.sh uses. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
need_environment scripts/requirements-dev.txt

# The live player's page is tested in a real browser. Without one its tests are skipped and say so.
if ! command -v chromium chromium-browser google-chrome > /dev/null && [[ "$(id -u)" == 0 ]] && command -v apt-get > /dev/null; then
    echo "installing Chromium for the tests of the player's page"
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium) > /dev/null 2>&1 \
        || echo "Chromium could not be installed: the page goes untested"
fi

ruff check .
ruff format --check .
# One process a core, one thread a process: the models are tiny. loadfile keeps the fixtures of a file in one process;
# tests/conftest.py has the slow files begin.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --durations 15 -m "not gpu" "$@"
