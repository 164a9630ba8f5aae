#!/bin/sh
# The image's install steps, in one place so that check_install.sh can run the very same ones without an engine.
#   install.sh wheels DIR   build or fetch every wheel into DIR, versions from constraints.txt
#   install.sh install DIR  install from DIR alone: no index, no compiler, no build
# PYTHON: the interpreter (default python). TORCH_INDEX: index of the torch build (default: pip's own). EXTRAS: of pyproject.toml.
set -eu
python=${PYTHON:-python}
extras=${EXTRAS:-cluster,compiled,s3,gguf,serve}
folder=$2

case $1 in
wheels)
  torch=$(sed -n 's/^\(torch==.*\)$/\1/p' constraints.txt)
  # torch first and from its own index: plain PyPI has the CUDA build, the CPU image wants the small one.
  "$python" -m pip wheel --no-cache-dir --wheel-dir "$folder" -c constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
  # deepspeed comes as source only; its build looks for torch and, told so, compiles nothing.
  "$python" -m pip install --no-cache-dir --quiet --no-index --find-links "$folder" "$torch"
  "$python" -m pip install --no-cache-dir --quiet -c constraints.txt setuptools wheel ninja py-cpuinfo
  "$python" -m pip download --no-cache-dir --quiet --no-deps --no-build-isolation --no-binary deepspeed \
    -c constraints.txt --dest "$folder/source" deepspeed
  DS_BUILD_OPS=0 "$python" -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$folder" \
    "$folder"/source/deepspeed-*
  rm -r "$folder/source"
  "$python" -m pip wheel --no-cache-dir --only-binary :all: --find-links "$folder" --wheel-dir "$folder" \
    -c constraints.txt $("$python" infra/image/requirements.py "$extras")
  "$python" -m pip wheel --no-cache-dir --no-deps --wheel-dir "$folder" .
  ;;
install)
  "$python" -m pip install --no-cache-dir --no-index --find-links "$folder" -c constraints.txt "lidit-pipeline[$extras]"
  "$python" -m pip check
  ;;
*)
  echo "usage: install.sh wheels|install DIR" >&2
  exit 2
  ;;
esac
