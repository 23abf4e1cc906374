#!/usr/bin/env bash
# What networks are for whose cost can be chosen, in a few minutes: points of a network, single images, budgets, and a
# training that is interrupted. With the trained networks of the zoo on the test images of CIFAR-10; where that cannot
# be downloaded, or the zoo lacks one of them, with small networks that are trained here on the embedded digits.
# If it is interrupted, run it again: it continues where it stopped.
set -eu
cd "$(dirname "$0")/.."
start=$SECONDS
part() { printf '\n=== %s [%d s so far]\n' "$*" $((SECONDS - start)); }

evaluate() { # NAME FLAGS...: of a network that `weights` finds
  local name=$1
  shift
  python3 eval_cifar10.py --pretrained="$(weights "$name")" --report="reports/demo/$name" "$@"
}

baseline=ResNet20 widths=mutualnet_wrn16_2 exits=msdnet_ge gates=dmnn32-t05
some_widths=w0.25-r16,w0.5-r16,w0.75-r16,w1-r16,w0.5-r32,w0.75-r32,w1-r32
weights() { printf 'zoo/%s' "$1"; }
part "1 of 4: networks of the zoo on 10,000 test images, at each of their points; the first time CIFAR-10 is downloaded"
if [ ! -e "models/weights/$gates.json" ] || ! evaluate "$baseline"; then
  printf '\nNOTE: the zoo lacks one of these networks, or CIFAR-10 could not be downloaded: this goes on with the\n'
  printf 'embedded digits, 1,797 small images, and with small networks that are trained now, a minute at most for each.\n'
  widths=mutualnet_wrn10_1 gates=dmnn32
  weights() { printf 'checkpoint/demo/%s/best.pth' "$1"; }
  for name in $baseline $widths $exits $gates; do
    part "$name learns the digits"
    python3 train_cifar10.py "@recipes/demo/$name" --save="checkpoint/demo/$name" --resume=auto
  done
  evaluate "$baseline"
fi
evaluate "$widths" --point=$some_widths
for name in $exits $gates; do evaluate "$name"; done
python3 -m reporting compare "reports/demo/$baseline" "reports/demo/$widths" "reports/demo/$exits" \
  "reports/demo/$gates" --out reports/demo

part "2 of 4: networks within a budget: 0.6 of the full multiply-accumulates, and 2 milliseconds an image"
evaluate "$exits" --budget=0.6x --report="reports/demo/$exits-0.6x"
evaluate "$widths" --budget=2ms --latency_batch=1 --point=$some_widths --report="reports/demo/$widths-2ms"

part "3 of 4: the quickest and the slowest single images, which the evaluations have drawn"
printf '%s\n' "reports/demo/$exits-0.6x/images.png" "reports/demo/$gates/images.png"

part "4 of 4: a training that is interrupted after 15 seconds and continued"
train() { "$@" python3 train_cifar10.py "@recipes/demo/dmnn32" --seed=1 --save=checkpoint/demo/again --resume=auto; }
train timeout --preserve-status --signal=INT 15 || true
train env

part "done: reports/demo/ has the table and the picture. To try next:"
cat <<END
python3 eval_cifar10.py --pretrained=$(weights $exits) --image <your image>    # what it sees, and what that costs
python3 train_cifar10.py --list_recipes                                        # published rows, to train them
python3 eval_cifar10.py --pretrained=$(weights $gates) --export onnx net.onnx  # for other programs
END
