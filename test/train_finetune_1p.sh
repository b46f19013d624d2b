#!/usr/bin/env bash
# Trains on from given weights on one device: 60 epochs at lr 2e-4, decaying from the 31st. The data set may be another
# one: where the number of identities differs, all weights but the classifier's are taken.
#   bash test/train_finetune_1p.sh --data_path=<folder> --pth_path=<weight file, or the folder of a ckpt.pth>

set -u
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_wrapper 1 finetune --total_epochs=60 --exp_decay_at_epoch=31 --base_lr=2e-4 -- "$@"
