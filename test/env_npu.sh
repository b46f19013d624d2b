#!/usr/bin/env bash
# The environment of Ascend NPUs: CANN's set_env.sh and the variables of torch_npu and HCCL. Source this file.
# Variables that are set already keep their values, as in TASK_QUEUE_ENABLE=1 bash test/train_full_8p.sh ...

export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0} # torch_npu is imported on demand
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}                         # a separate thread issues operators
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}                             # adjacent copies become one
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-2}                         # threads stay near their device
export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}  # seconds; a rank may still be reading its data set
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3} # errors only
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}

# Prints the path of CANN's set_env.sh, from its variables or the default places; nothing if there is none.
find_cann() {
    local folder
    for folder in \
        "${ASCEND_HOME:-}" "${ASCEND_HOME:+$ASCEND_HOME/ascend-toolkit}" "${ASCEND_HOME:+$ASCEND_HOME/cann}" \
        "${ASCEND_TOOLKIT_HOME:-}" "${ASCEND_TOOLKIT_HOME:+$ASCEND_TOOLKIT_HOME/..}" "${ASCEND_HOME_PATH:-}" \
        /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/cann /usr/local/Ascend \
        "${HOME:-}/Ascend/ascend-toolkit" "${HOME:-}/Ascend/cann"; do
        if [ -n "$folder" ] && [ -f "$folder/set_env.sh" ]; then
            echo "$folder/set_env.sh"
            return
        fi
    done
}

# Sources it without the wrappers' `set -u`: CANN's script reads variables that may be unset.
source_cann() {
    local script nounset=''
    script=$(find_cann)
    if [ -z "$script" ]; then
        [ "${device:-npu}" != npu ] || echo "env_npu.sh: no set_env.sh of CANN under ASCEND_HOME, ASCEND_TOOLKIT_HOME" \
            "or /usr/local/Ascend; an NPU needs it: install CANN, or set ASCEND_HOME"
        return
    fi
    case $- in *u*) nounset=yes ;; esac
    set +u
    # shellcheck source=/dev/null
    source "$script"
    [ -z "$nounset" ] || set -u
}

source_cann
