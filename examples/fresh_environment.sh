#!/usr/bin/env bash
# A new environment with this library in it, what of it runs there, and what type checkers make of it.
#
#     bash examples/fresh_environment.sh [FOLDER]
#
# FOLDER is where the environment goes (fresh-environment). The torch is the one that constraints.txt names.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-fresh-environment}
python3 -m venv "$folder"
python="$folder/bin/python"
pip() { "$python" -m pip install --quiet --disable-pip-version-check -c "$source/constraints.txt" "$@"; }

pip "$(grep '^torch==' "$source/constraints.txt")"
pip "$source"

# The kernels run; `mir` says what it lacks.
"$python" "$source/examples/kernels.py"
"$folder/bin/mir" doctor || true
pip "$source[mir]"
"$folder/bin/mir" doctor

# Types: mypy as strictly as it goes; pyright by its own rules, its strict ones being of torch's names.
pip mypy basedpyright
"$python" -m mypy --strict "$source/examples/kernels.py"
echo '{"typeCheckingMode": "standard"}' > "$folder/pyrightconfig.json"
cp "$source/examples/kernels.py" "$folder/kernels.py"
"$folder/bin/basedpyright" --project "$folder/pyrightconfig.json" --pythonpath "$python" "$folder/kernels.py"
