#!/usr/bin/env bash
# Install this library into a new environment, run it there, and type-check it with mypy and pyright.
#
#     bash examples/fresh_environment.sh [FOLDER]
#
# FOLDER is the folder of the environment (default: fresh-environment). constraints.txt determines the torch version.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-fresh-environment}
python3 -m venv "$folder"
python="$folder/bin/python"
pip() { "$python" -m pip install --quiet --disable-pip-version-check -c "$source/constraints.txt" "$@"; }

pip "$(grep '^torch==' "$source/constraints.txt")"
pip "$source"

# The kernels run; `mir` names the packages it is missing.
"$python" "$source/examples/kernels.py"
"$folder/bin/mir" doctor || true
pip "$source[mir]"
"$folder/bin/mir" doctor

# Type checks: mypy in strict mode; pyright in standard mode, because its strict mode objects to torch's own types.
pip mypy basedpyright
"$python" -m mypy --strict "$source/examples/kernels.py"
echo '{"typeCheckingMode": "standard"}' > "$folder/pyrightconfig.json"
cp "$source/examples/kernels.py" "$folder/kernels.py"
"$folder/bin/basedpyright" --project "$folder/pyrightconfig.json" --pythonpath "$python" "$folder/kernels.py"
