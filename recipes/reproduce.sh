#!/usr/bin/env bash
# Train the published CIFAR rows, the most instructive first, and record the results in results/measured/.
# All of them take days on a GPU; name recipes as arguments to train only those. Run it again and it continues.
# Runs compute in float32, as the published ones did; OPTIONS=--fast (or --amp=bf16) trains faster, see docs/speed.md.
# SEEDS="1 2" also trains each recipe with these seeds. Second stages always start from the run with the recipe's seed.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- \
  cifar10-resnet32-s8u1 cifar10-resnet32-s16u1 cifar10-resnet32-s16u1-double \
  cifar10-resnet56-s8u1 cifar10-resnet56-s16u1 cifar10-resnet56-s16u1-double cifar10-resnet32 cifar10-resnet56 \
  cifar100-msdnet-b7 cifar100-msdnet-ge-b7 cifar100-imta-b7 \
  cifar100-dmnn50-n4-t05 cifar100-dmnn50-n4-t06 cifar100-dmnn50-n4-t07 \
  cifar10-resnet56-s16u1-double-skip cifar10-resnet56-s16u1-double-adn \
  cifar10-mutualnet-wrn28-10 cifar100-mutualnet-wrn28-10
for recipe in "$@"; do
  for seed in "" ${SEEDS:-}; do
    name=$recipe${seed:+-seed$seed}
    [ ! -e "results/measured/$name/evaluation.json" ] || continue # already recorded
    python3 train_cifar10.py "@recipes/$recipe" ${seed:+--seed=$seed} ${OPTIONS:-} --resume=auto --save="checkpoint/$name"
    python3 -m reporting keep "checkpoint/$name" "$name"
  done
done
python3 -m reporting page
