#!/usr/bin/env bash
# What networks are for whose cost can be chosen, in a few minutes: points of a network, single images, budgets, and a
# training that is interrupted. With the trained networks of the zoo on the test images of CIFAR-10; where that cannot
# be downloaded, with small networks that are trained here on the embedded digits.
# If it is interrupted, run it again: it continues where it stopped.
set -eu
cd "$(dirname "$0")/.."
start=$SECONDS
part() { printf '\n=== %s [%d s so far]\n' "$*" $((SECONDS - start)); }

of_zoo() { # the first of some names that the zoo has, if any
  for name; do [ ! -e "models/weights/$name.json" ] || { echo "$name" && return; }; done
}

evaluate() { # NAME FLAGS...: of a network that `weights` finds
  local name=$1
  shift
  python3 eval_cifar10.py --pretrained="$(weights "$name")" --report="reports/demo/$name" "$@"
}

baseline=$(of_zoo ResNet20 ResNet32) exits=$(of_zoo exits_resnet32 msdnet_ge)
widths=$(of_zoo mutualnet_wrn10_2) gates=$(of_zoo dmnn32-t07) depths=$(of_zoo ResNet32_DoubleShared_ADN)
weights() { printf 'zoo/%s' "$1"; }
part "1 of 4: networks of the zoo on 10,000 test images, at each of their points; the first time CIFAR-10 is downloaded"
if [ -z "$baseline" ] || [ -z "$exits" ] || ! evaluate "$baseline" --fold; then
  printf '\nNOTE: without CIFAR-10 the demonstration goes on with the embedded digits, 1,797 images, and with small\n'
  printf 'networks that are trained now, a minute at most for each.\n'
  baseline=ResNet20 exits=msdnet_ge widths=mutualnet_wrn10_1 gates=dmnn32 depths=
  weights() { printf 'checkpoint/demo/%s/best.pth' "$1"; }
  for name in $baseline $widths $exits $gates; do
    part "$name learns the digits"
    python3 train_cifar10.py "@recipes/demo/$name" --save="checkpoint/demo/$name" --resume=auto
  done
  evaluate "$baseline" --fold
fi
some_widths=w0.25-r16,w0.5-r16,w1-r16,w0.5-r32,w1-r32
[ -z "$widths" ] || evaluate "$widths" --point=$some_widths --query_table=reports/demo/widths.json
for name in $depths $exits $gates; do evaluate "$name" --fold; done
all="$baseline $depths $widths $exits $gates"
python3 -m reporting compare $(printf 'reports/demo/%s ' $all) --out reports/demo
for name in $all; do
  [ "$(weights "$name")" != "zoo/$name" ] ||
    sed -n "s/ *\"epochs\": \([0-9]*\),/$name was trained for \1 epochs/p" "models/weights/$name.json"
done

part "2 of 4: networks within a budget, such as 0.6 of the full multiply-accumulates"
evaluate "$exits" --budget=0.6x --fold --report="reports/demo/$exits-0.6x"
[ -z "$widths" ] ||
  evaluate "$widths" --budget=2ms --latency_batch=1 --query_table=reports/demo/widths.json \
    --report="reports/demo/$widths-2ms" ||
  echo "a machine that is slow or busy; the demonstration goes on"

part "3 of 4: the quickest and the slowest single images, which the evaluations have drawn"
for name in "$exits-0.6x" $gates; do echo "reports/demo/$name/images.png"; done

part "4 of 4: a training that is interrupted after 10 seconds and continued"
train() { "$@" python3 train_cifar10.py "@recipes/demo/dmnn32" --seed=1 --save=checkpoint/demo/again --resume=auto; }
train timeout --preserve-status --signal=INT 10 || true
train env

part "done: reports/demo/ has the table and the picture. To try next:"
cat <<END
python3 eval_cifar10.py --pretrained=$(weights $exits) --image <your image>    # what it sees, and what that costs
python3 train_cifar10.py --list_recipes                                        # published rows, to train them
python3 eval_cifar10.py --pretrained=$(weights $exits) --export onnx exits/    # for other programs, in stages
END
