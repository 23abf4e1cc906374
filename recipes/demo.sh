#!/usr/bin/env bash
# What a network is for whose cost can be chosen, in a few minutes: several points of one network, single images, a
# budget, and a minute of training. With the trained networks of the zoo on CIFAR-10's test images; on the embedded
# digits, with networks trained here for a minute, where CIFAR-10 cannot be downloaded or the zoo is empty.
# If it is interrupted, run it again: it continues where it stopped.
set -eu
cd "$(dirname "$0")/.."
started=$SECONDS
part() { printf '\n== %s (%d s since the start)\n\n' "$1" $((SECONDS - started)); }

