#!/usr/bin/env bash
# Train a plain ResNet32 and one with shared filter bases for a few minutes on real images, and compare them.
# If it is interrupted, run it again: it continues where it stopped.
set -eu
cd "$(dirname "$0")/.."
python3 train_cifar10.py @recipes/demo --model=ResNet32 --save=checkpoint/demo-plain --resume=auto
python3 train_cifar10.py @recipes/demo --model=ResNet32_SingleShared --shared_rank=8 --save=checkpoint/demo-shared --resume=auto
python3 -m reporting compare checkpoint/demo-plain checkpoint/demo-shared --out reports/demo
