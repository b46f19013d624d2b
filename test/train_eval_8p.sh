#!/usr/bin/env bash
# Tests weights on 8 devices, without training. Results are in ./eval, beside the files of the training.
#   bash test/train_eval_8p.sh --data_path=<folder> --pth_path=<weight file, or the folder of a ckpt.pth>

set -u
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_wrapper 8 eval --only_test=true --exp_dir=./eval -- "$@"
