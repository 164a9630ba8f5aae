#!/bin/sh
# Run the image's install steps in a fresh environment, where no container engine is at hand: wheels first, then the
# installation from the wheels alone, then every import, the command, and the bill of materials.
#   sh infra/image/check_install.sh        (about five minutes; needs a package index)
set -eu
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/build"
PYTHON="$folder/build/bin/python" sh infra/image/install.sh wheels "$folder/wheels"
python3 -m venv "$folder/run"
PYTHON="$folder/run/bin/python" sh infra/image/install.sh install "$folder/wheels"

cd "$folder"   # away from the checkout, so that the installed package is what gets imported
DS_ACCELERATOR=cpu "$folder/run/bin/python" -c "
import deepspeed, lidit.config, mlflow, pipelines.submit, ray, torch, transformers
print('ray', ray.__version__, 'torch', torch.__version__, 'deepspeed', deepspeed.__version__)"
if [ -x "$folder/run/bin/lidit" ]; then "$folder/run/bin/lidit" --help > /dev/null; fi

python3 -m venv "$folder/sbom"
"$folder/sbom/bin/pip" install --quiet --no-cache-dir "$(sed -n 's/.*\(cyclonedx-bom==[0-9.]*\).*/\1/p' "$OLDPWD/infra/image/Dockerfile")"
"$folder/sbom/bin/cyclonedx-py" environment --output-format JSON --output-file sbom.json "$folder/run/bin/python"
"$folder/run/bin/python" -c "
import json
names = {part['name'].lower() for part in json.load(open('sbom.json'))['components']}
missing = {'ray', 'torch', 'deepspeed', 'mlflow', 'lidit-pipeline'} - names
assert not missing, missing
print(len(names), 'components in the bill of materials')"
echo "check_install: ok"
