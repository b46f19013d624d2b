#!/usr/bin/env bash
# What the wrappers share. Sourcing this file only defines functions; `run_wrapper` is the one that wrappers call.
#
# Conventions of Ascend's tooling, which reads what the wrappers write:
#   test/output/<device>/train_<device>.log      everything a rank said; rank 0's device is ASCEND_DEVICE_ID (default 0)
#   test/output/<device>/train_<case>_loss.txt   the loss of each epoch, one a line
#   test/output/<device>/<case>.log              the figures, `Key = value`
# <case> is AlignedReID_for_PyTorch_bs<BatchSize>_<RANK_SIZE>p_<perf|acc|finetune|eval>. BatchSize is --ids_per_batch, the
# identities per device, as in the published case names; a step has BatchSize x --ims_per_id x RANK_SIZE images.

network=AlignedReID_for_PyTorch
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Runs a wrapper from its options to its exit status:
#   run_wrapper <processes> <kind of case> <recipe flag>... -- "$@"
# The caller's directory stays the current one: paths are the caller's, and the weight file ends there as ckpt.pth.
run_wrapper() {
    local start_time default_nproc=$1 kind=$2
    start_time=$(date +%s)
    shift 2
    flags=(--ids_per_batch=128 --ims_per_id=4 --base_lr=5e-4 --train_final_batch=true)
    while [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    shift
    parse_options "$@"
    choose_processes "$default_nproc"
    choose_device
    choose_run_folder
    choose_python
    set_environment
    check_input

    local case_name folder log status
    case_name=${network}_bs$(last_value ids_per_batch)_${RANK_SIZE}p_$kind
    folder=$project/test/output/$ASCEND_DEVICE_ID
    log=$folder/train_$ASCEND_DEVICE_ID.log
    mkdir -p "$folder" || refuse "cannot write $folder"
    rm -f -- "$log" "$folder/train_${case_name}_loss.txt" "$folder/$case_name.log"
    echo "$case_name: $nproc x $device, log in $log"
    train "$log"
    status=$?
    write_results "$case_name" "$folder" "$log" "$status" $(($(date +%s) - start_time))
    exit "$status"
}

# One line on stderr, exit status 2: a mistake of the user's.
refuse() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

# ---- options and what follows from them ----------------------------------------------------------------------------

# The wrappers' own options, and train.py's: these come after the recipe, and argparse takes the last one.
parse_options() {
    data_path='' weights='' device=npu nproc='' nnodes=${PET_NNODES:-${NNODES:-1}} addr='' port='' max_restarts=0
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
            --nproc=*) nproc=$value ;;
            --nnodes=*) nnodes=$value ;;
            --node_rank=*) node_rank=$value ;;
            --addr=*) addr=$value ;;
            --port=*) port=$value ;;
            --max_restarts=*) max_restarts=$value ;;
            -*=*) flags+=("$option") ;;
            *) refuse "options are --name=value, which $option is not; see --help" ;;
        esac
    done
    [ -n "$data_path" ] || refuse "--data_path=<folder with images/ and partitions.pkl> is needed"
    case $kind in
        eval | finetune) [ -n "$weights" ] || refuse "--pth_path=<weights: a file, or the folder of a ckpt.pth> is needed" ;;
    esac
    flags+=("--data_path=$data_path" "--device=$device")
    # A folder stands for its ckpt.pth; any other mistake in the path is train.py's to explain.
    [ ! -f "$weights/ckpt.pth" ] || weights=${weights%/}/ckpt.pth
}

show_help() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    cat <<END
Options:
  --data_path=<folder>      data set: images/ and partitions.pkl
  --pth_path=<file|folder>  weights to start from or to test; a folder holds ckpt.pth
  --workers=<n>             processes that decode images, per device
  --device=npu|cuda|cpu     default: npu
  --nproc=<n>               processes, one a device; default: the 8 or 1 of the wrapper's name
  --nnodes= --node_rank= --addr= --port=       several machines; default: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
  --max_restarts=<n>        start again from the last checkpoint after a process has died (default: 0)
  --<flag>=<value>          every flag of script/train.py; it overrides the recipe
END
    exit 0
}

# The last value given for --<name> among the flags, as argparse reads them.
last_value() {
    printf '%s\n' "${flags[@]}" | sed -n "s/^--$1=//p" | tail -n 1
}

# Sets nproc and RANK_SIZE. Ascend's platform says in RANK_SIZE how many devices an 8p job has; a 1p job has one.
choose_processes() {
    local default=$1
    [ "$default" -gt 1 ] || nnodes=1
    is_count "$nnodes" || refuse "--nnodes=$nnodes is not a number of machines"
    if [ -z "$nproc" ] && [ "$default" -gt 1 ] && [ -n "${RANK_SIZE:-}" ]; then
        is_count "$RANK_SIZE" || refuse "RANK_SIZE=$RANK_SIZE is not a number of processes"
        nproc=$((RANK_SIZE / nnodes))
    fi
    nproc=${nproc:-$default}
    is_count "$nproc" || refuse "--nproc=$nproc is not a number of processes"
    [[ $node_rank =~ ^[0-9]+$ ]] || refuse "--node_rank=$node_rank is not the number of a machine"
    [[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max_restarts=$max_restarts is not a number of restarts"
    export RANK_SIZE=$((nproc * nnodes))
}

is_count() {
    [[ $1 =~ ^[1-9][0-9]*$ ]]
}

# ASCEND_DEVICE_ID names the log. For one process it is also the NPU to use, unless ASCEND_RT_VISIBLE_DEVICES has made a
# choice already: then that device is number 0.
choose_device() {
    local asked=${ASCEND_DEVICE_ID:-}
    if [ "$RANK_SIZE" -eq 1 ] && [ "$device" = npu ] && [ -n "$asked" ] && [ -z "${ASCEND_RT_VISIBLE_DEVICES:-}" ]; then
        [ -n "$(last_value npu)" ] || flags+=("--npu=$asked")
    fi
    export ASCEND_DEVICE_ID=${asked:-$((node_rank * nproc))}
    [[ $ASCEND_DEVICE_ID =~ ^[0-9]+$ ]] || refuse "ASCEND_DEVICE_ID=$ASCEND_DEVICE_ID is not the number of a device"
}

# A training's run folder is the current one (train.py keeps a former run's files there under another name); a test's is
# eval/ in it, beside the files of the training.
choose_run_folder() {
    local run_folder=.
    [ "$kind" != eval ] || run_folder=./eval
    [ -n "$(last_value exp_dir)" ] || flags+=("--exp_dir=$run_folder")
}

choose_python() {
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=$project/.venv/bin/python
        [ -x "$python" ] || python=python3
    fi
    command -v "$python" >/dev/null || refuse "there is no $python; PYTHON=<path> names another"
}

# The platform sets up the environment itself and says so with etp_running_flag=true.
set_environment() {
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # before torch: a broken torch_npu would stop its import
    if [ "${etp_running_flag:-}" != true ]; then
        # shellcheck source=/dev/null
        source "$project/test/env_npu.sh"
    fi
}

# ---- running ---------------------------------------------------------------------------------------------------------

# Refuses mistakes in flags and files before anything is written; the one line comes from train.py's parts.
check_input() {
    run_script --check=only || exit $?
}

# Trains with everything said on the console and in the log; returns the training's own exit status.
train() {
    if [ "$RANK_SIZE" -eq 1 ] && [ "$max_restarts" -eq 0 ]; then
        run_logged "$1"
    else # the launcher keeps a log for each rank
        run_script --check=false --log_dir="$project/test/output" --first_device="$ASCEND_DEVICE_ID"
    fi
}

# Runs one process, its stdout and stderr copied to the log and still apart on the console.
run_logged() {
    local log=$1 pipes status readers=()
    pipes=$(mktemp -d) || refuse "no folder for temporary files"
    mkfifo "$pipes/out" "$pipes/err"
    : >"$log"
    # A signal is the training's to answer; what it says then is still to be read.
    (trap '' INT TERM HUP && exec tee -a "$log") <"$pipes/out" &
    readers+=($!)
    (trap '' INT TERM HUP && exec tee -a "$log") <"$pipes/err" >&2 &
    readers+=($!)
    {
        run_script --check=false
        status=$?
        # What is killed, say for want of memory, cannot say so itself.
        if [ "$status" -gt 128 ] && [ -z "$passed_on" ]; then
            echo "train.py: stopped: killed by signal $((status - 128)) ($(kill -l "$status"))" >&2
        fi
    } >"$pipes/out" 2>"$pipes/err"
    wait "${readers[@]}"
    rm -r -- "$pipes"
    return "$status"
}

# train.py through the launcher, which becomes train.py where there is one process.
run_script() {
    supervise "$python" "$project/script/launch.py" --nproc="$nproc" --nnodes="$nnodes" --node_rank="$node_rank" \
        --addr="$addr" --port="${port:-0}" --max_restarts="$max_restarts" "$@" \
        "$project/script/train.py" "${flags[@]}" ${weights:+"--model_weight_file=$weights"}
}

# Runs a command, passes signals on to it, waits for its end and returns its exit status.
supervise() {
    set -m # a process group of its own: Ctrl-C reaches it once, from here (a plain background job would ignore it)
    "$@" </dev/null &
    child=$!
    set +m
    passed_on=''
    local name status seen=none
    for name in INT TERM HUP; do
        # shellcheck disable=SC2064 # the name of now
        trap "passed_on+=' $name'; kill -s $name $child 2>/dev/null" "$name"
    done
    while [ "$seen" != "$passed_on" ]; do # a signal ends `wait`, not the command
        seen=$passed_on
        wait "$child" 2>/dev/null
        status=$?
    done
    trap - INT TERM HUP
    return "$status"
}

# ---- reading the log, as Ascend's tooling does -------------------------------------------------------------------------

# The lines are told by their beginnings, too: a path in the settings may hold FPS, cmc1 or Ep.

# Mean of the last 5 FPS: the 5th field of `Ep 12, 27.03s, FPS 118.20, ...`. Nothing where there is none.
fps_of() {
    LC_ALL=C awk '
        /^Ep .*FPS/ { sub(/,$/, "", $5); fps[count++] = $5 }
        END {
            first = count > 5 ? count - 5 : 0
            for (i = first; i < count; i++) sum += fps[i]
            if (count) printf "%.2f\n", sum / (count - first)
        }' "$1"
}

# rank@1 in percent: the 4th field of the last `[mAP: 71.38%], [cmc1: 87.05%], ...`.
accuracy_of() {
    LC_ALL=C awk '/^\[mAP.*cmc1/ { rank1 = $4 } END { sub(/%.*/, "", rank1); print rank1 }' "$1"
}

# The loss of each epoch: what follows `loss` on lines with `Ep`.
losses_of() {
    LC_ALL=C sed -n '/^Ep /s/.*loss[ :]*\([^, ]*\).*/\1/p' "$1"
}

# Milliseconds of a training step: images in it, over images/s.
step_milliseconds() {
    [ -z "$1" ] || LC_ALL=C awk -v fps="$1" -v images=$((RANK_SIZE * $(last_value ids_per_batch) * $(last_value ims_per_id))) \
        'BEGIN { if (fps > 0) printf "%.2f\n", images * 1000 / fps }'
}

# Writes the case's files and prints the final lines. A failed training has no figures, and none are shown.
write_results() {
    local case_name=$1 folder=$2 log=$3 status=$4 seconds=$5 fps='' accuracy='' loss=''
    [ ! -f "$log" ] || losses_of "$log" >"$folder/train_${case_name}_loss.txt"
    if [ "$status" -eq 0 ]; then
        fps=$(fps_of "$log")
        accuracy=$(accuracy_of "$log")
        loss=$(tail -n 1 "$folder/train_${case_name}_loss.txt")
    fi
    cat >"$folder/$case_name.log" <<END
Network = $network
RankSize = $RANK_SIZE
BatchSize = $(last_value ids_per_batch)
DeviceType = $(uname -m)
CaseName = $case_name
ActualFPS = $fps
TrainingTime = $(step_milliseconds "$fps")
TrainAccuracy = $accuracy
ActualLoss = $loss
E2ETrainingTime = $seconds
END
    echo "------------------ Final result ------------------"
    echo "Final Performance images/sec : $fps"
    echo "Final Train Accuracy : $accuracy"
    echo "E2E Training Duration sec : $seconds"
}
