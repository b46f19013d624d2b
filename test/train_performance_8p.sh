#!/usr/bin/env bash
# Speed on 8 devices: 10 epochs of the Ascend recipe (an epoch of Market-1501 is one step there, and the first two steps
# are left out of FPS), then the test.
#   bash test/train_performance_8p.sh --data_path=<folder>

set -u
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_wrapper 8 perf --total_epochs=10 -- "$@"
