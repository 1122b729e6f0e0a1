#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 8 minutes on one H100 or H200:  benchmarks/gpu.sh OUT [--small]
# Writes OUT/tests.txt, OUT/gpu.json and OUT/gpu.txt. --small runs tiny models on any device, to try the script.
# Needs PyTorch 2.11 or later with CUDA, torchvision and transformers. What else is missing there is installed without a
# network from a folder wheels/ beside this script, which the following fills on a machine that has one:
#   pip download -d benchmarks/wheels pydantic pyyaml rich matplotlib scikit-learn safetensors pytest pytest-timeout hypothesis
set -uo pipefail
out=${1:?"a folder for the results"}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ -d benchmarks/wheels ]]; then
    python3 -m pip install -q --no-index --find-links benchmarks/wheels pydantic pyyaml rich matplotlib scikit-learn safetensors \
        pytest pytest-timeout hypothesis
fi
timeout 150 python3 -m pytest -p no:cacheprovider tests/test_gpu.py tests/noise/test_noise.py -k "gpu or cuda" 2>&1 | tee "$out/tests.txt"
tests=$?
timeout 310 python3 benchmarks/gpu.py --json "$out/gpu.json" "$@" 2>&1 | tee "$out/gpu.txt"
benchmark=$?
exit $((tests || benchmark))
