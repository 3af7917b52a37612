#!/usr/bin/env bash
# A virtual environment in $VENV for $PYTHON: this project, its extras dev and docs, and exactly the
# versions of the constraints file for that Python. One line is printed for each step.
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_LINK_MODE="${UV_LINK_MODE:-copy}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

step() { # step WORDS COMMAND…: prints the words; the command's output only where it fails.
    echo "$1"
    shift
    "$@" >"$log" 2>&1 || { cat "$log"; exit 1; }
}

version=$("$PYTHON" -c 'import sys; print("{}{}".format(*sys.version_info))')
lock=$(ls constraints/py"$version"-*.txt)
step "$VENV: a virtual environment with $("$PYTHON" --version)" "$PYTHON" -m venv "$VENV"
uv=$(command -v uv || true)
if [ -z "$uv" ] && "$VENV/bin/python" -m pip install --quiet uv >"$log" 2>&1; then
    uv="$VENV/bin/uv"
fi
links=(${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
if [ -n "$uv" ]; then
    install=("$uv" pip install --python "$VENV/bin/python" "${links[@]}")
else
    install=("$VENV/bin/python" -m pip install)
fi
if [ -n "${TORCH:-}" ]; then # another build than the constraints': they must not name one
    kept=$(mktemp)
    grep -v '^torch==' "$lock" >"$kept"
    step "$VENV: $TORCH" "${install[@]}" "$TORCH"
    lock=$kept
fi
step "$VENV: $(grep -c == "$lock") packages of ${lock#./} (minutes on a first machine)" \
    "${install[@]}" --constraint "$lock" --editable ".[dev,docs]"
