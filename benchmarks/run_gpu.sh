#!/usr/bin/env bash
# Everything about the kernels that needs an NVIDIA GPU, in one call: right results first, then the figures.
# Needs torch with CUDA, triton and this package (pip install -e ".[dev,eval,triton]"). PYTHON picks the interpreter.
# Writes JSON and pictures to OUT (default: benchmarks/kernels/<gpu>). Some minutes on an H100.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || exit 2
OUT=${OUT:-benchmarks/kernels/$GPU}
mkdir -p "$OUT"
failed=0

"$PYTHON" -m pytest -p no:cacheprovider tests/kernels/test_cuda.py | tee "$OUT/tests.txt" || failed=1

DENSITIES="0.5 0.25 0.15 0.10 0.05 0.03"
for shape in flux-2048 cogvideox-5b wan2.1-1.3b flux-4096 wan2.1-14b hunyuan-video; do
  repeats=20
  case $shape in wan2.1-14b | hunyuan-video) repeats=5 ;; esac
  for layout in random structured; do
    flag=$([ "$layout" = structured ] && echo --structured)
    "$PYTHON" -m dit_attn bench kernels --shape "$shape" --dtype bfloat16 --density $DENSITIES --repeats $repeats \
      --against triton-tma flex $flag --device cuda --output "$OUT/$shape-$layout.json" --plot "$OUT/$shape-$layout.png" ||
      failed=1
  done
done
"$PYTHON" -m dit_attn.kernels.tune --output "$OUT/tune.json" || failed=1
exit $failed
