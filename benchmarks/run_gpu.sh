#!/usr/bin/env bash
# Everything about the kernels and whole steps that needs an NVIDIA GPU: right results first, then the figures.
#
#   benchmarks/run_gpu.sh                    all of it; the largest need 80 GB; about an hour on an H100
#   benchmarks/run_gpu.sh correct ladder     some parts: correct, capture, ladder, steps, tune, models
#   benchmarks/run_gpu.sh ladder:wan2.1-1.3b-random steps:cogvideox-5b     single jobs; a name may end in *
#   benchmarks/run_gpu.sh list               the names of all jobs
#
# Needs torch with CUDA, triton and this package (pip install -e ".[dev,eval,triton]"). xFormers, FlashInfer and
# SpargeAttn are measured where they are installed. One job that fails or runs out of time costs its own figures only.
#
# Environment
#   OUT     where JSON and pictures of the kernels go   (default: benchmarks/kernels/<gpu>)
#   STEPS   where JSON of whole steps goes              (default: benchmarks/steps/<gpu>)
#   MODELS  where JSON of the embedded models goes      (default: benchmarks/models/<gpu>)
#   LIMIT   seconds after which no further job is begun; what runs is stopped then (default: no limit)
#   RESUME  1 leaves out jobs whose JSON is there already
#   PYTHON  interpreter (default: python3);  DEVICE  (default: cuda)
#   SMALL   1 runs tiny sizes, to try this script itself; DEVICE=cpu SMALL=1 needs no GPU
# Exit status: 0 all done, 1 a job failed, 2 wrong use, 3 only time was short. OUT/jobs.txt says what became of each job.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SMALL=${SMALL:-0} RESUME=${RESUME:-0} LIMIT=${LIMIT:-0}
PARTS="correct capture ladder steps tune models"
WANTED=("$@")
[ $# -eq 0 ] && read -r -a WANTED <<<"$PARTS"
LIST=0
[ "${WANTED[0]}" = list ] && LIST=1
begun=$SECONDS done=0 failed=() late=()

wanted() { # whether job $1 (part:name) was asked for
  local one
  for one in "${WANTED[@]}"; do
    # shellcheck disable=SC2053
    [[ $1 == $one || ${1%%:*} == "$one" ]] && return 0
  done
  return 1
}

if [ $LIST -eq 0 ]; then
  everything=("${WANTED[@]}")
  for one in "${everything[@]}"; do
    WANTED=("$one") found=0
    while read -r name; do wanted "$name" && found=1; done < <(bash benchmarks/run_gpu.sh list)
    [ $found -eq 1 ] || { echo "run_gpu.sh: no part or job '$one'; 'benchmarks/run_gpu.sh list' names them" >&2 && exit 2; }
  done
  WANTED=("${everything[@]}")
  if [ "$DEVICE" = cpu ]; then
    GPU=cpu
  else
    GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || {
      echo "run_gpu.sh: no NVIDIA GPU that torch can use; DEVICE=cpu SMALL=1 tries the script without one" >&2
      exit 2
    }
  fi
  OUT=${OUT:-benchmarks/kernels/$GPU} STEPS=${STEPS:-benchmarks/steps/$GPU} MODELS=${MODELS:-benchmarks/models/$GPU}
  mkdir -p "$OUT/logs" "$STEPS" "$MODELS" || exit 2
fi

note() { # state, job, seconds
  printf '%-8s %-40s %5s s\n' "$@" | tee -a "$OUT/jobs.txt"
}

clocks() { # what the GPU was doing, so that a throttled run can be told
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=timestamp,name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu \
    --format=csv,noheader >>"$OUT/gpu.csv" 2>/dev/null || true
}

job() { # part:name, seconds it may take, file it makes ("-": none), command ...
  local name=$1 seconds=$2 file=$3 left started status
  shift 3
  if [ $LIST -eq 1 ]; then echo "$name" && return; fi
  wanted "$name" || return 0
  if [ "$RESUME" = 1 ] && [ "$file" != - ] && [ -s "$file" ]; then note there "$name" 0 && return; fi
  if [ "$LIMIT" -gt 0 ]; then
    left=$((LIMIT - (SECONDS - begun)))
    if [ $left -lt 20 ]; then late+=("$name") && note late "$name" 0 && return; fi
    [ $left -lt "$seconds" ] && seconds=$left
  fi
  clocks
  started=$SECONDS
  timeout --kill-after=10 "$seconds" "$@" >"$OUT/logs/${name//:/-}.txt" 2>&1 </dev/null
  status=$?
  clocks
  if [ $status -eq 0 ]; then
    done=$((done + 1)) && note done "$name" $((SECONDS - started))
  elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
    late+=("$name") && note late "$name" $((SECONDS - started))
  else
    failed+=("$name") && note failed "$name" $((SECONDS - started))
    tail -n 5 "$OUT/logs/${name//:/-}.txt" | cut -c 1-300
  fi
}

# -- correct -----------------------------------------------------------------------------------------------------------
job correct:kernels 400 - "$PYTHON" -m pytest -p no:cacheprovider tests/kernels/backends/test_cuda.py

# -- capture: one call of a trained model, on a picture as large as a film ---------------------------------------------
CAPTURED=${OUT:-}/captured-tiny-image.safetensors
size=1280
[ "$SMALL" = 1 ] && size=128
job capture:tiny-image 200 "$CAPTURED" "$PYTHON" -m dit_attn bench capture --source tiny-image --height $size --width $size \
  --steps 2 --device "$DEVICE" --output "$CAPTURED"

# -- ladder: kernels against density -----------------------------------------------------------------------------------
rung() { # job, repeats, flags ...
  local name=$1 repeats=$2
  shift 2
  job "ladder:$name" 400 "${OUT:-}/$name.json" "$PYTHON" -m dit_attn bench kernels --dtype bfloat16 \
    --density 0.5 0.25 0.15 0.10 0.05 0.03 --repeats "$repeats" --against triton-tma flex flashinfer spargeattn \
    --device "$DEVICE" --output "${OUT:-}/$name.json" --plot "${OUT:-}/$name.png" "$@"
}
for shape in wan2.1-1.3b flux-2048 cogvideox-5b flux-4096 wan2.1-14b hunyuan-video; do
  repeats=20 flags=()
  case $shape in wan2.1-14b | hunyuan-video) repeats=6 ;; esac
  [ "$SMALL" = 1 ] && repeats=1 && flags=(--seq 600 --heads 2 --dim 32 --block 32)
  for kind in random structured; do
    rung "$shape-$kind" $repeats --shape $shape --inputs $kind ${flags[@]+"${flags[@]}"}
  done
done
rung tiny-image-captured 10 --inputs "$CAPTURED"

# -- refreshes of measured masks and pooled keys, by the kernel and by plain torch -------------------------------------
[ "$SMALL" = 1 ] || job refresh:pooled 300 "${OUT:-}/refresh.json" "$PYTHON" -m tests._support.cpp_benchmark \
  --device "$DEVICE" --output "${OUT:-}/refresh.json"

# -- steps: one denoising step of the real architectures, random weights, at the densities of the papers ---------------
step() { # job, configuration, flags ...
  local name=$1 config=$2 flags=()
  shift 2
  [ "$SMALL" = 1 ] && flags=(--layers 2 --heads 1 --tokens 1100 --repeats 1)
  job "steps:$name" 500 "${STEPS:-}/$name.json" "$PYTHON" -m dit_attn bench model --config "$config" --random-weights \
    --device "$DEVICE" --dtype bfloat16 --output "${STEPS:-}/$name.json" "$@" ${flags[@]+"${flags[@]}"}
}
square() { # --height and --width, which tiny sizes leave out
  [ "$SMALL" = 1 ] || echo "--height $1 --width $1"
}
RECT=rectified-spaattn:density BLOCK=block-sparse:density RE=re-ttention:density
step wan2.1-1.3b wan2.1-1.3b --method $BLOCK=0.25 --method $RECT=0.25 --method $RECT=0.15 --method $RE=0.04
step cogvideox-5b cogvideox-5b --method $BLOCK=0.25 --method $RECT=0.25 --method $RE=0.04 --method $RE=0.03125
step flux-1024 flux --method $BLOCK=0.25 --method $RECT=0.1 --method $RE=0.04
# shellcheck disable=SC2046
step flux-4096 flux $(square 4096) --repeats 5 --method $BLOCK=0.1 --method $RECT=0.1 --method $RE=0.04
step pixart-sigma-1024 pixart-sigma --method $BLOCK=0.25 --method $RECT=0.25 --method $RE=0.04
# shellcheck disable=SC2046
step pixart-sigma-2048 pixart-sigma $(square 2048) --method $BLOCK=0.1 --method $RECT=0.1 --method $RE=0.04
step hunyuan-video hunyuan-video --repeats 3 --method $BLOCK=0.11 --method $RECT=0.2 --method $RECT=0.11 \
  --method $RE=0.04,cache=fp8
step wan2.1-14b wan2.1-14b --repeats 3 --method $BLOCK=0.25 --method $RECT=0.25 --method $RECT=0.15 --method $RE=0.04

# -- tune: configurations of the forward kernel ------------------------------------------------------------------------
for shape in wan2.1-1.3b cogvideox-5b; do
  job tune:$shape 300 "${OUT:-}/tune-$shape.json" env $([ "$DEVICE" = cpu ] && echo TRITON_INTERPRET=1) "$PYTHON" -m dit_attn.kernels.benchmark.tune --shape $shape \
    --output "${OUT:-}/tune-$shape.json" --device "$DEVICE" $([ "$SMALL" = 1 ] && echo --small)
done

# -- models: whole runs of the embedded models, which are too many for a CPU -------------------------------------------
whole() { # job, seconds, flags of tiny sizes ("-": none), script and flags ...
  local name=$1 seconds=$2 small=()
  [ "$SMALL" = 1 ] && [ "$3" != - ] && read -r -a small <<<"$3"
  shift 3
  job "models:$name" "$seconds" "${MODELS:-}/$name.json" "$PYTHON" "$@" --device "$DEVICE" \
    --output "${MODELS:-}/$name.json" ${small[@]+"${small[@]}"}
}
for model in tiny-video tiny-image tiny-joint; do
  whole high-resolution_$model 900 --quick benchmarks/high_resolution/measure.py $model --count 48 --resume
done
whole high-resolution_tiny-multi 900 --quick benchmarks/high_resolution/measure.py tiny-multi --filled --count 48 --resume
for model in tiny-video tiny-image; do
  whole error-control_$model 900 --quick benchmarks/error_control/measure.py $model --resume
done
for objects in 2 3 4; do
  whole isolation_tiny-multi_$objects 600 --quick -m tests._support.subjects_benchmark --what isolation --model tiny-multi \
    --objects $objects --steps 10 --lines "${MODELS:-}/isolation_tiny-multi_$objects.jsonl"
done
for pieces in 1 2 3 4; do
  for model in tiny-multi tiny-edit; do
    whole saas_${model}_$pieces 600 --quick -m tests._support.subjects_benchmark --what saas --model $model \
      --objects $pieces --steps 10 --lines "${MODELS:-}/saas_${model}_$pieces.jsonl"
  done
done
for model in tiny-image tiny-joint tiny-video; do
  whole head-drop_$model 600 "--count 1 --profiled 1 --searched 0 --steps 2 --seeds 1 --fractions 0.1" \
    -m dit_attn.pipelines.head_drop.measure $model --resume
done
for model in tiny-video tiny-multi; do
  curves=(--quick --count 1 --points 0 1 --steps 2)
  [ "$SMALL" = 1 ] || curves=(--count 200 --points 0 100 300)
  job models:finetune_$model 1800 "${MODELS:-}/finetune_$model/curves.json" "$PYTHON" -m dit_attn.pipelines.finetune.curves \
    --model $model --device "$DEVICE" "${curves[@]}" --output "${MODELS:-}/finetune_$model"
done
for model in tiny-image tiny-joint; do
  whole nag_$model 600 "--count 1 --steps 2" -m tests._support.nag_benchmark --model $model --count 96 --steps 20
done

[ $LIST -eq 1 ] && exit 0
echo "$done done, ${#failed[@]} failed, ${#late[@]} out of time; $((SECONDS - begun)) s; logs in $OUT/logs"
[ ${#failed[@]} -gt 0 ] && echo "failed: ${failed[*]}" && exit 1
[ ${#late[@]} -gt 0 ] && echo "out of time: ${late[*]}" && exit 3
exit 0
