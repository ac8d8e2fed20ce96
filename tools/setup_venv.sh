#!/usr/bin/env bash
# Make or bring up to date the virtual environment of the CPU set-up: what `make setup` runs.
# Environment: VENV, EXTRAS, and by choice PYTHON, PIP_INDEX, TORCH_INDEX (see CONTRIBUTING.md).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${VENV:-.venv}
extras=${EXTRAS:-server,embedded,openai-server,plots,dev}
constraints=constraints/cpu.txt
log=$venv/setup.log

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

pip_install() {
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "${index[@]}" -c "$constraints" "$@" \
        >>"$log" 2>&1 && return
    tail -n 15 "$log" >&2
    fail "pip could not install the packages (its last lines stand above, all of them in $log)"
}

index=()
if [ -n "${PIP_INDEX:-}" ]; then index=(--index-url "$PIP_INDEX"); fi

mkdir -p "$venv"
exec 9>"$venv/setup.lock" # two makes at once take turns
if command -v flock >/dev/null; then flock 9; fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if ! python=$(tools/pick_python.sh); then
        rm -f "$venv/setup.lock"
        rmdir "$venv" 2>/dev/null || true
        exit 1
    fi
    say "making $venv with $python ($("$python" -V))"
    "$python" -m venv "$venv"
elif ! problem=$("$venv/bin/python" tools/check_host.py 2>&1); then
    fail "$venv cannot be used, run make distclean and try again: $problem"
elif [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -V 2>&1)" != "$("$venv/bin/python" -V 2>&1)" ]; then
    fail "$venv was made with $("$venv/bin/python" -V), not with PYTHON=$PYTHON: run make distclean first to change it"
else
    say "using $venv ($("$venv/bin/python" -V))"
fi
: >"$log"

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -n "${TORCH_INDEX:-}" ]; then
        say "installing PyTorch from TORCH_INDEX"
        index+=(--extra-index-url "$TORCH_INDEX")
    else
        say "installing PyTorch (with TORCH_INDEX unset this may be the CUDA build, several GB: see CONTRIBUTING.md)"
    fi
    pip_install torch
fi
say "installing morphserve[$extras] and its dependencies at the versions in $constraints"
pip_install --editable ".[$extras]"
"$venv/bin/python" -c 'import numpy, torch' || fail "the environment is broken: run make distclean and try again"
say "ready in $SECONDS s"
