#!/usr/bin/env bash
# Print the path of a Python that can run the CPU set-up, or one sentence on stderr and status 1.
# With PYTHON set, that one is judged; otherwise the first fit one of python3.11, 3.12, 3.10, python3.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
problem=""

works() { [ "$("$1" -c 'print("works")' 2>/dev/null)" = works ]; } # a pyenv shim may exist and fail

judge() { # prints the interpreter's own path and ends the script if it is fit; else keeps the sentence
    local sentence status
    sentence=$("$1" "$here/check_host.py" 2>&1) && status=0 || status=$?
    if [ "$status" = 0 ]; then
        "$1" -c 'import sys; print(sys.executable)'
        exit 0
    fi
    # What a supported version lacks is nearer to a remedy than another's version.
    if [ -z "$problem" ] || { [ "$status" = 1 ] && [ "$problem_status" = 2 ]; }; then
        problem=$sentence problem_status=$status
    fi
}

if [ -n "${PYTHON:-}" ]; then
    if works "$PYTHON"; then judge "$PYTHON"; else problem="PYTHON=$PYTHON does not run: name a Python 3.10, 3.11 or 3.12"; fi
else
    for name in python3.11 python3.12 python3.10 python3; do
        while IFS= read -r path; do
            if works "$path"; then judge "$path"; fi
        done < <(type -ap "$name")
    done
fi
echo "${problem:-no Python was found: install Python 3.11 (apt-get install python3.11-venv, or pyenv) and run make PYTHON=python3.11}" >&2
exit 1
