#!/usr/bin/env bash
# Writes constraints/: everything that the project with its extras dev and docs installs, for each
# pair of Python and Axolotl that is tested.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "make lock needs uv: pip install uv"; exit 1; }
for pair in 3.11:0.19 3.12:0.21; do
    python=${pair%:*} axolotl=${pair#*:}
    file=constraints/py${python/./}-axolotl$axolotl.txt
    echo "$file"
    echo "axolotl==$axolotl.*" | uv pip compile --quiet pyproject.toml - --extra dev --extra docs \
        --python-version "$python" --upgrade --no-annotate \
        --custom-compile-command "make lock" --output-file "$file"
    # A CUDA build of torch names its own triton; beside a CPU build, that one makes kernels of
    # linear attention look for a GPU.
    sed -i '/^triton==/d' "$file"
done
