#!/usr/bin/env bash
# Speed on one device: 5 epochs of the Ascend recipe (128 x 4 images, lr 5e-4), then the test.
#   bash test/train_performance_1p.sh --data_path=<folder>
# runs anywhere with --device=cpu --total_epochs=1 --ids_per_batch=8 --pretrained=none --resize_h_w=128,64

set -u
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_wrapper 1 perf --total_epochs=5 -- "$@"
