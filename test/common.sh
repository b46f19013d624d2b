#!/usr/bin/env bash
# What the wrappers share. Sourcing this file only defines functions; wrappers call `run_wrapper`.
#
# Ascend's tooling reads these files, in test/output/<device>/ of the first rank's device:
#   train_<device>.log      what the first rank prints
#   train_<case>_loss.txt   the loss of each epoch, one a line
#   <case>.log              the figures, `Key = value`
# <case> is AlignedReID_for_PyTorch_bs<BatchSize>_<RANK_SIZE>p_<perf|acc|finetune|eval>; BatchSize is --ids_per_batch.

network=AlignedReID_for_PyTorch
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Runs a wrapper from its options to its exit status: run_wrapper <processes> <kind of case> <recipe flag>... -- "$@"
# Paths are relative to the caller's directory, where the weights end as ckpt.pth.
run_wrapper() {
    local default_nproc=$1 kind=$2 case_name folder log status
    shift 2
    flags=(--ids_per_batch=128 --ims_per_id=4 --base_lr=5e-4 --train_final_batch=true --exp_dir=.)
    while [ "$1" != -- ]; do flags+=("$1") && shift; done
    shift
    parse_options "$@"
    choose_processes "$default_nproc"
    python=${PYTHON:-$(command -v "$project/.venv/bin/python" || echo python3)}
    command -v "$python" >/dev/null || refuse "there is no $python; PYTHON=<path> names another"
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # before torch is imported: a broken torch_npu would stop the import
    # shellcheck source=/dev/null
    [ "${etp_running_flag:-}" = true ] || source "$project/test/env_npu.sh" # the platform sets up its own environment
    run_script --check=only || exit $?

    case_name=${network}_bs$(last_value ids_per_batch)_${RANK_SIZE}p_$kind
    folder=$project/test/output/$ASCEND_DEVICE_ID log=$project/test/output/$ASCEND_DEVICE_ID/train_$ASCEND_DEVICE_ID.log
    mkdir -p "$folder" || refuse "cannot write $folder"
    rm -f -- "$log" "$folder/train_${case_name}_loss.txt" "$folder/$case_name.log"
    echo "$case_name: $nproc x $device, log in $log"
    run_script --check=false --log_dir="$project/test/output" --first_device="$ASCEND_DEVICE_ID"
    status=$?
    [ "$status" -ne 137 ] || echo "$(basename "$0"): error: killed by SIGKILL; is memory short?" >&2
    write_results
    exit "$status"
}

# Reports a user's mistake in one line on stderr, with exit status 2.
refuse() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

# Sets the wrappers' own options; train.py's flags follow the recipe's, and argparse takes the last one of each.
parse_options() {
    data_path='' weights='' device=npu nproc='' nnodes=${PET_NNODES:-${NNODES:-1}} addr='' port=0 max_restarts=0
    node_rank=${PET_NODE_RANK:-${NODE_RANK:-0}}
    local option value
    for option in "$@"; do
        value=${option#*=}
        case $option in
            -h | --help) show_help ;;
            --data_path=* | --data_pth=*) data_path=$value ;;
            --pth_path=* | --model_weight_file=*) weights=$value ;;
            --pkl_path=*) [ -z "$value" ] || flags+=("--partition_file=$value") ;; # the published wrappers' name
            --device=*) device=$value ;;
            --nproc=* | --nnodes=* | --node_rank=* | --addr=* | --port=* | --max_restarts=*) declare -g "${option#--}" ;;
            -*=*) flags+=("$option") ;;
            *) refuse "options are --name=value, which $option is not; see --help" ;;
        esac
    done
    [ -n "$data_path" ] || refuse "--data_path=<folder with images/ and partitions.pkl> is needed"
    [[ $kind != eval && $kind != finetune || -n $weights ]] ||
        refuse "--pth_path=<weights: a file, or the folder of a ckpt.pth> is needed"
    [ ! -f "$weights/ckpt.pth" ] || weights=${weights%/}/ckpt.pth
    flags+=("--data_path=$data_path" "--device=$device" ${weights:+"--model_weight_file=$weights"})
}

show_help() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    cat <<END
Options: --data_path=<folder with images/ and partitions.pkl>, --pth_path=<weight file, or the folder of a ckpt.pth>,
  --device=npu|cuda|cpu (default: npu), --workers=<processes that decode images, per device>,
  --nproc=<processes, one a device> (default: the 8 or 1 of the wrapper's name),
  --nnodes= --node_rank= --addr= --port= for several machines (default: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT),
  --max_restarts=<n> (default: 0) after a process has died, and every flag of script/train.py, which overrides the recipe.
END
    exit 0
}

# The last value given for --<name> among the flags, as argparse reads them.
last_value() {
    printf '%s\n' "${flags[@]}" | sed -n "s/^--$1=//p" | tail -n 1
}

# Sets nproc, RANK_SIZE and ASCEND_DEVICE_ID, which names the log. The platform gives RANK_SIZE, all processes of an 8p
# job, and ASCEND_DEVICE_ID, for one process also the NPU; with ASCEND_RT_VISIBLE_DEVICES set, that NPU is number 0.
choose_processes() {
    local default=$1 asked=${ASCEND_DEVICE_ID:-} name
    [ "$default" -gt 1 ] || nnodes=1 RANK_SIZE=''
    for name in nnodes RANK_SIZE nproc; do [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || refuse "$name=${!name} is not a count"; done
    [ -z "${RANK_SIZE:-}" ] || default=$((RANK_SIZE / nnodes))
    nproc=${nproc:-$default}
    for name in node_rank max_restarts asked; do
        [[ ${!name:-0} =~ ^[0-9]+$ ]] || refuse "${name/asked/ASCEND_DEVICE_ID}=${!name} is not a whole number"
    done
    export RANK_SIZE=$((nproc * nnodes)) ASCEND_DEVICE_ID=${asked:-$((node_rank * nproc))}
    [[ $RANK_SIZE$device != 1npu || -z $asked || -n ${ASCEND_RT_VISIBLE_DEVICES:-}$(last_value npu) ]] ||
        flags+=("--npu=$asked")
}

# Runs train.py by the launcher, passes signals on to it, and returns its exit status.
run_script() {
    set -m # a process group for the launcher: Ctrl-C then reaches it once, by the trap; a background job would ignore it
    "$python" "$project/script/launch.py" --nproc="$nproc" --nnodes="$nnodes" --node_rank="$node_rank" --addr="$addr" \
        --port="${port:-0}" --max_restarts="$max_restarts" "$@" "$project/script/train.py" "${flags[@]}" </dev/null &
    set +m
    local child=$! name
    # shellcheck disable=SC2064 # the name of now
    for name in INT TERM HUP USR1; do trap "kill -s $name $child 2>/dev/null" "$name"; done
    while kill -0 "$child" 2>/dev/null; do wait "$child" 2>/dev/null; done # a signal ends `wait`, not the launcher
    trap - INT TERM HUP USR1
    wait "$child"
}

# The next three read the log as Ascend's tooling does, but at line starts: a path in the settings may hold FPS or Ep.
# Mean of the last 5 FPS: the 5th field of `Ep 12, 27.03s, FPS 118.20, ...`. Empty if there is none.
fps_of() {
    grep '^Ep .*FPS' "$1" | tail -n 5 | LC_ALL=C awk '{ sum += $5 } END { if (NR) printf "%.2f\n", sum / NR }'
}

# rank@1 in percent: the 4th field of the last `[mAP: 71.38%], [cmc1: 87.05%], ...`.
accuracy_of() {
    LC_ALL=C awk '/^\[mAP.*cmc1/ { rank1 = $4 } END { sub(/%.*/, "", rank1); print rank1 }' "$1"
}

# The loss of each epoch: what follows `loss` on lines with `Ep`.
losses_of() {
    LC_ALL=C sed -n '/^Ep /s/.*loss[ :]*\([^, ]*\).*/\1/p' "$1"
}

# Writes the files of run_wrapper's case and prints the final lines. A failed training has no figures.
write_results() {
    local fps='' accuracy='' loss='' step='' images=$((RANK_SIZE * $(last_value ids_per_batch) * $(last_value ims_per_id)))
    [ ! -f "$log" ] || losses_of "$log" >"$folder/train_${case_name}_loss.txt"
    if [ "$status" -eq 0 ]; then
        fps=$(fps_of "$log") accuracy=$(accuracy_of "$log") loss=$(losses_of "$log" | tail -n 1)
        step=$(LC_ALL=C awk -v fps="$fps" -v images="$images" 'BEGIN { if (fps > 0) printf "%.2f\n", images * 1000 / fps }')
    fi
    cat >"$folder/$case_name.log" <<END
Network = $network
RankSize = $RANK_SIZE
BatchSize = $(last_value ids_per_batch)
DeviceType = $(uname -m)
CaseName = $case_name
ActualFPS = $fps
TrainingTime = $step
TrainAccuracy = $accuracy
ActualLoss = $loss
E2ETrainingTime = $SECONDS
END
    echo "------------------ Final result ------------------"
    echo "Final Performance images/sec : $fps"
    echo "Final Train Accuracy : $accuracy"
    echo "E2E Training Duration sec : $SECONDS"
}
