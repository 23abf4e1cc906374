#!/usr/bin/env bash
# Train the networks of the zoo one after the other, all alike, and add each to models/weights/ with what it reaches;
# name some of them to train only those. Interrupted, it continues where it stopped when it is run again;
# `nice -n 19 bash recipes/zoo.sh` leaves the machine to other work. OPTIONS=... is added to each command. SEED=1 trains
# them again with that seed and adds only what this reaches.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- ResNet20 ResNet32_ADN ResNet32 msdnet_ge IMTA_MSDNet mutualnet_wrn10_2 ResNet32_SingleShared \
  ResNet32_DoubleShared_ADN ResNet32_DoubleShared dmnn32-t07 convnet_aig32 exits_resnet32
train() { # NAME RUN FLAGS...
  python3 train_cifar10.py "@recipes/zoo/$1" --fast --resume=auto --save="checkpoint/zoo/$2" "${@:3}" ${OPTIONS:-}
}
for name in "$@"; do
  if [ -n "${SEED:-}" ]; then
    train "$name" "$name-seed$SEED" --seed="$SEED"
    python3 -m tools.add_to_zoo "checkpoint/zoo/$name-seed$SEED" --seed_of="$name"
    continue
  fi
  ! grep -qs '"epochs": 40,' "models/weights/$name.json" || continue # finished
  train "$name" "$name"
  python3 -m tools.add_to_zoo "checkpoint/zoo/$name"
done
[ -n "${SEED:-}" ] || python3 -m tools.time_zoo # in turns, so that they compare
python3 -m reporting zoo
