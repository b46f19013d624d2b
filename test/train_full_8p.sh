#!/usr/bin/env bash
# Full training on 8 devices with the Ascend recipe (128 x 4 images a device, lr 5e-4, 300 epochs), then the test.
#   bash test/train_full_8p.sh --data_path=<folder>
# The weights are then in ./ckpt.pth.

set -u
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_wrapper 8 acc --total_epochs=300 --exp_decay_at_epoch=151 -- "$@"
