# Sourced by the other scripts: makes .venv with requirements.txt if need be, and activates it.
#   need_environment [REQUIREMENTS_FILE ...]     requirements.txt is always installed, further files after it
# An environment that is active already (VIRTUAL_ENV, CONDA_PREFIX, but not conda's base) is used and given what it lacks.

# OpenMP threads that wait by spinning take the core from those they wait for, as soon as anything else runs: on two busy
# cores a training step took ten times as long.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

need_environment() {
    local root python stamp files=(requirements.txt "$@")
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    cd "$root"
    if [[ -z "${VIRTUAL_ENV:-}" && (-z "${CONDA_PREFIX:-}" || "${CONDA_DEFAULT_ENV:-}" == base) ]]; then
        if [[ ! -x .venv/bin/python ]]; then
            python="$(find_python)"
            echo "making the environment $root/.venv with $("$python" --version)"
            if ! "$python" -m venv .venv 2> /dev/null; then
                rm -rf .venv
                install_venv_module
                "$python" -m venv .venv
            fi
        fi
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    # What was installed is remembered by its content, so that a second run starts at once.
    stamp="$(python -c 'import sys; print(sys.prefix)')/.requirements-$(cat "${files[@]}" pyproject.toml | sha256sum | cut -c1-16)-$(echo "$root" | sha256sum | cut -c1-8)"
    if [[ ! -e "$stamp" ]]; then
        echo "installing ${files[*]} (a few minutes the first time)"
        local arguments=()
        for file in "${files[@]}"; do arguments+=(-r "$file"); done
        python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
        touch "$stamp"
    fi
}

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if command -v "$name" > /dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; on Debian or Ubuntu: apt-get install python3 python3-venv" >&2
    exit 2
}

install_venv_module() {
    local run=()
    if [[ "$(id -u)" != 0 ]]; then
        run=(sudo -n)
    fi
    if ! { "${run[@]}" apt-get update -qq && "${run[@]}" apt-get install -y -qq python3-venv; } > /dev/null 2>&1; then
        echo "error: Python's venv module is missing; install it first: sudo apt-get install python3-venv" >&2
        exit 2
    fi
}
