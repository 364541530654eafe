# Sourced by the other scripts: creates FOLDER where it is missing and installs into it.
# Usage: . scripts/_venv.sh; prepare EXTRAS [FOLDER]
prepare() {
    local folder="${2:-.venv}"
    if [ ! -x "$folder/bin/python" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "Expected python3 to be Python >= 3.10. Received: $(python3 --version)" >&2
            exit 1
        }
        python3 -m venv "$folder"
    fi
    # Reinstalls only where the metadata or the wanted extras changed.
    local wanted="$folder/.installed-$1"
    if [ ! -e "$wanted" ] || [ setup.cfg -nt "$wanted" ] || [ pyproject.toml -nt "$wanted" ]; then
        "$folder/bin/python" -m pip install --quiet --editable ".[$1]"
        touch "$wanted"
    fi
    # The lines about absent CUDA drivers and CPU features hide real messages.
    export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
    # So does JAX's traceback where only its compiler for GPUs is installed (`.[predict]`).
    if compgen -G "$folder/lib/python*/site-packages/jax_plugins/xla_cuda*" > /dev/null &&
        ! command -v nvidia-smi > /dev/null; then
        export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
    fi
}
