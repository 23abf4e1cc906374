#!/usr/bin/env bash
# What to run first where a GPU is at hand: in 25 minutes, the first of which are worth most.
#   bash recipes/on_gpu.sh [OUT]            each step's output goes to OUT/<step>.txt (default: reports/on_gpu)
# A step that fails or runs out of its time does not stop the others. Run again with the same OUT, it does what is not
# done yet, and trainings continue where they stopped.
#   MINUTES=25          for everything            DATA=DIR     of CIFAR-10, for the trainings
#   QUICK=1             small sizes, as a trial   DRY=1        print the steps, their seconds and their commands
#   PYTHON=python3      what starts Python            WORKERS=8    processes that run tests
set -u
cd "$(dirname "$0")/.."
out=${1:-reports/on_gpu}
python=${PYTHON:-python3}
end=$((SECONDS + 60 * ${MINUTES:-25}))
[ -n "${DRY:-}" ] || mkdir -p "$out"

step() { # NAME SECONDS WORDS...: `python3 WORDS`, in at most so many seconds
  local name=$1 most=$2 left=$((end - SECONDS)) began=$SECONDS code=0
  shift 2
  if [ -n "${DRY:-}" ]; then
    echo "$name $most python3 $*"
    return
  fi
  if [ -e "$out/$name.done" ]; then
    echo "$name: done before"
    return
  fi
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 15 ]; then
    echo "$name: no time left"
    return
  fi
  # a training saves when it is asked to stop; what has not ended by then is killed
  timeout --kill-after=30 "$most" $python "$@" >"$out/$name.txt" 2>&1 || code=$?
  case $code in
  0) touch "$out/$name.done"; result=done ;;
  124 | 137 | 143) result="stopped by its time" ;;
  *) result="FAILED ($code)" ;;
  esac
  echo "$name: $result, $((SECONDS - began)) s: $(tail -n 1 "$out/$name.txt")"
}

train() { # RECIPE SECONDS FLAGS...
  local name=$1 most=$2
  shift 2
  [ -z "${QUICK:-}" ] || set -- "$@" --epochs=1 --dataset=digits --subset=256 --valid=100 --batch_size=64
  step "train-$name" "$most" train_cifar10.py "@recipes/$name" --fast --resume=auto --save="$out/$name" \
    ${DATA:+--dataset_path="$DATA"} "$@"
}

quick=${QUICK:+--quick}
side=${QUICK:+32} small=${QUICK:+2}
# 1. is it right: graphs, replicas, waits, resumed runs; every precision and form of step to the same accuracy
step tests 360 -m pytest -m cuda -n "${WORKERS:-8}" -rP
# 2. how fast is it: eager and recorded steps of five systems with launches and floor; ResNet-50 in images a second
step fast-eager 150 benchmarks/fast.py --no_compile $quick
step resnet50 90 benchmarks/ilsvrc_step.py --amp=bf16 --batch_size=${small:-256} --side=${side:-224} $quick
# 3. what does it reach: published rows, trained with --fast
for name in cifar10-resnet56-s16u1-double cifar10-resnet56-s16u1 cifar10-resnet56-s8u1 cifar10-resnet32-s16u1 \
  cifar10-resnet32-s16u1-double cifar10-resnet32-s8u1; do
  train "$name" 900
done
for name in cifar10-msdnet-b7-lingrow cifar100-dmnn50-n4-t05 cifar10-mutualnet-wrn16-2; do
  train "$name" 1200
done
# 4. what does compiling add: each system takes minutes to compile in three forms
for system in shared-basis embedded msdnet slimmable dmnn; do
  step "fast-$system" 420 benchmarks/fast.py --only=$system $quick
done
step resnet50-compile 300 benchmarks/ilsvrc_step.py --amp=bf16 --batch_size=${small:-256} --side=${side:-224} \
  --compile $quick
[ -n "${DRY:-}" ] || echo "written: $out"
