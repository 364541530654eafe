# Sourced by run and test: makes .venv where it is missing and installs into it.
# Usage: . scripts/_venv.sh; prepare EXTRAS
prepare() {
    if [ ! -x .venv/bin/python ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "Expected python3 to be Python >= 3.10. Received: $(python3 --version)" >&2
            exit 1
        }
        python3 -m venv .venv
    fi
    # Installed anew only where the metadata or the wanted extras changed.
    local wanted=".venv/.installed-$1"
    if [ ! -e "$wanted" ] || [ setup.cfg -nt "$wanted" ] || [ pyproject.toml -nt "$wanted" ]; then
        .venv/bin/python -m pip install --quiet --editable ".[$1]"
        touch "$wanted"
    fi
    # The lines about absent CUDA drivers and CPU features hide real messages.
    export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
}
