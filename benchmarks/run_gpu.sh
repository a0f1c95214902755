#!/usr/bin/env bash
# Everything about the kernels and whole steps that needs an NVIDIA GPU, in one call: right results first, then the figures.
# Needs torch with CUDA, triton and this package (pip install -e ".[dev,eval,triton]"). PYTHON picks the interpreter.
# Writes JSON and pictures to OUT (default: benchmarks/kernels/<gpu>) and JSON of whole steps of models to STEPS (default:
# benchmarks/steps/<gpu>); the largest of them need 80 GB. Give it an hour on an H100.
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

# One denoising step of the real architectures, random weights, at the densities of the papers.
STEPS=${STEPS:-benchmarks/steps/$GPU}
step() {
  local name=$1 config=$2
  shift 2
  "$PYTHON" -m dit_attn bench model --config "$config" --random-weights --device cuda --dtype bfloat16 \
    --output "$STEPS/$name.json" "$@" || failed=1
}
RECT=rectified-spaattn:density
BLOCK=block-sparse:density
RE=re-ttention:density
step wan2.1-1.3b wan2.1-1.3b --method $BLOCK=0.25 --method $RECT=0.25 --method $RECT=0.15 --method $RE=0.04
step wan2.1-14b wan2.1-14b --repeats 3 --method $BLOCK=0.25 --method $RECT=0.25 --method $RECT=0.15 --method $RE=0.04
step hunyuan-video hunyuan-video --repeats 3 --method $BLOCK=0.11 --method $RECT=0.2 --method $RECT=0.11 \
  --method $RE=0.04,cache=fp8
step cogvideox-5b cogvideox-5b --method $BLOCK=0.25 --method $RECT=0.25 --method $RE=0.04 --method $RE=0.03125
step flux-1024 flux --method $BLOCK=0.25 --method $RECT=0.1 --method $RE=0.04
step flux-4096 flux --height 4096 --width 4096 --repeats 5 --method $BLOCK=0.1 --method $RECT=0.1 --method $RE=0.04
step pixart-sigma-1024 pixart-sigma --method $BLOCK=0.25 --method $RECT=0.25 --method $RE=0.04
step pixart-sigma-2048 pixart-sigma --height 2048 --width 2048 --method $BLOCK=0.1 --method $RECT=0.1 --method $RE=0.04

"$PYTHON" -m dit_attn.kernels.tune --output "$OUT/tune.json" || failed=1
exit $failed
