#!/usr/bin/env bash
#SBATCH --job-name=cellphase
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
# Start a training on a workstation, on several nodes, or as a SLURM job; docs/clusters.md says how.
#
# Between the ranks and this script stands a folder, trainer/control.py: each rank leaves rank<N>.runs.<process id>
# there, which at its end becomes rank<N>.exited.<exit code>; the script leaves preempt.<its signal>. So a signal
# reaches the ranks themselves and their exit codes come back, neither of which a launcher passes on.

if [ -z "${BASH_VERSION:-}" ] || [ "${BASH_VERSINFO[0]}" -lt 4 ]; then
    echo "launch.sh: error: needs bash 4 or newer: bash launch.sh CONFIG" >&2
    exit 2
fi
set -u

readonly USER_MISTAKE=2 PREEMPTED=75 INTERRUPTED=130
# How long ranks whose launcher is gone, or whose run other ranks have given up, may take to end before they are killed.
readonly ORPHAN_SECONDS=300
# How long a node that is asked to end waits for ranks that have not begun; after what time it says that it waits for
# other nodes, and five times that between the next ones; how often it looks whether other ranks have given the run up.
readonly BEGIN_SECONDS=20 PATIENCE_SECONDS=60 LOOK_SECONDS=10
# What the folder for temporary files must take.
readonly LEAST_FREE_BYTES=65536

usage() {
    cat <<'TEXT'
usage: launch.sh [--dry-run] [--accelerate-config FILE|NAME] [--help]
                 [finetune] CONFIG [key=value ...] [trainer option ...]
       sbatch [sbatch option ...] launch.sh [the same]

Start trainer/train.py on CONFIG with accelerate launch, or with the word finetune before CONFIG
`python -m trainer finetune`. What follows CONFIG goes to the trainer as it stands;
--resume is added: where neither the command nor CONFIG says what to go on from, it is the run's newest checkpoint.

  --dry-run                       check everything, print the command, start nothing
  --accelerate-config FILE|NAME   a path, or a name in accelerate_configs/ (ddp, zero2, ...); without it cpu, gpu,
                                  ddp, cpu_2_processes or multi_node_ddp, by devices, processes and nodes
  --help                          show this text

Environment:
  PROCESSES_PER_NODE              default: one for each GPU, else what the accelerate config says
  NODES, NODE_RANK                number of nodes (1), and which one this is (0 ... NODES - 1)
  MASTER_ADDR, MASTER_PORT        address of node 0, and a free port there (29500)
  PYTHON                          default: .venv/bin/python of the repository, else python3
  CELLPHASE_SAVE_SECONDS          how long processes that are asked to end may take before they are killed (1800)
  CELLPHASE_MEET_SECONDS          how long a node waits for the others before it ends (1800)
  CELLPHASE_HOME                  the repository, where SLURM runs a copy of this script and it is not found

Signals: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end the run with a checkpoint; a second Ctrl-C ends it at once.
Exit codes: 0 done, 2 a mistake in the command or its files, 75 ended with a checkpoint, to be started again,
130 interrupted, 1 anything else.
TEXT
}

say() {
    printf 'launch.sh: %s\n' "$*" >&2
}

die() {
    say "error: $*"
    exit "$USER_MISTAKE"
}

# ---------------------------------------------------------------- what to run

is_repository() {
    [[ -f $1/trainer/train.py && -d $1/accelerate_configs ]]
}

find_repository() {
    local path command
    path=$(readlink -f -- "${BASH_SOURCE[0]}")
    root=${path%/*}
    is_repository "$root" && return
    # sbatch runs a copy of the script from a spool folder.
    if [[ -n ${CELLPHASE_HOME:-} ]]; then
        root=$CELLPHASE_HOME
        is_repository "$root" || die "CELLPHASE_HOME=$root holds no trainer/train.py and accelerate_configs/"
    else
        root=
        if [[ -n ${SLURM_JOB_ID:-} ]] && command -v scontrol >/dev/null; then
            command=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/^ *Command=//p')
            # Arguments follow the script's path, and a path may hold spaces.
            while [[ -n $command ]]; do
                if [[ $command == */* ]] && is_repository "${command%/*}"; then
                    root=${command%/*}
                    break
                fi
                [[ $command == *' '* ]] || break
                command=${command% *}
            done
        fi
        if [[ -z $root && -n ${SLURM_SUBMIT_DIR:-} ]] && is_repository "$SLURM_SUBMIT_DIR"; then
            root=$SLURM_SUBMIT_DIR
        fi
        [[ -n $root ]] || die "the repository was not found: $path is a copy outside of it;" \
            "set CELLPHASE_HOME to the folder with trainer/ and accelerate_configs/, or submit from there"
    fi
    root=$(cd -- "$root" && pwd)
}

find_python() {
    local asked=${PYTHON:-}
    if [[ -z $asked ]]; then
        asked=python3
        [[ -x $root/.venv/bin/python ]] && asked=$root/.venv/bin/python
    fi
    python=$(command -v -- "$asked") || die "there is no Python at '$asked'; set PYTHON to that of the installation"
    if [[ $python != /* ]]; then
        python=$(cd -- "$(dirname -- "$python")" && pwd)/${python##*/}
    fi
}

parse_command_line() {
    dry_run='' accelerate_config='' config=''
    while (($#)); do
        case $1 in
            --dry-run) dry_run=1 ;;
            --accelerate-config)
                (($# > 1)) || die "--accelerate-config needs a file or a name"
                accelerate_config=$2
                shift
                ;;
            --accelerate-config=*) accelerate_config=${1#*=} ;;
            -h | --help)
                usage
                exit 0
                ;;
            --)
                shift
                break
                ;;
            -*) die "unknown option $1; options of the trainer go after CONFIG; launch.sh --help lists those before it" ;;
            *) break ;;
        esac
        shift
    done
    task=train
    if [[ ${1:-} == train || ${1:-} == finetune ]] && [[ ! -f $1 ]]; then
        task=$1
        shift
    fi
    (($#)) || die "no CONFIG given: launch.sh CONFIG [key=value ...]"
    config=$1
    shift
    trainer_arguments=("$@")
    [[ -f $config ]] || die "no such file: $config (looked for in $PWD)"
}

is_count() {
    [[ $1 =~ ^[1-9][0-9]{0,8}$ ]]
}

check_numbers() {
    nodes=${NODES:-1} node_rank=${NODE_RANK:-0} port=${MASTER_PORT:-}
    is_count "$nodes" || die "NODES=$nodes is not a whole number of at least 1"
    [[ $node_rank =~ ^[0-9]{1,9}$ ]] || die "NODE_RANK=$node_rank is not a whole number of at least 0"
    node_rank=$((10#$node_rank))
    ((node_rank < nodes)) || die "NODE_RANK=$node_rank, but NODES=$nodes; ranks of nodes go from 0 to $((nodes - 1))"
    if [[ -n $port ]]; then
        if ! is_count "$port" || ((port > 65535)); then
            die "MASTER_PORT=$port is not a port; give a number from 1 to 65535"
        fi
    fi
    if ((nodes > 1)); then
        [[ -n ${MASTER_ADDR:-} ]] || die "NODES=$nodes needs MASTER_ADDR, the address of node 0 as the others reach it"
        port=${port:-29500}
    fi
    save_seconds=${CELLPHASE_SAVE_SECONDS:-1800} meet_seconds=${CELLPHASE_MEET_SECONDS:-1800}
    is_count "$save_seconds" || die "CELLPHASE_SAVE_SECONDS=$save_seconds is not a whole number of at least 1 (seconds)"
    is_count "$meet_seconds" || die "CELLPHASE_MEET_SECONDS=$meet_seconds is not a whole number of at least 1 (seconds)"
    if [[ -n ${PROCESSES_PER_NODE:-} ]]; then
        is_count "$PROCESSES_PER_NODE" ||
            die "PROCESSES_PER_NODE=$PROCESSES_PER_NODE is not a whole number of at least 1"
    fi
}

count_gpus() {
    gpus=0
    command -v nvidia-smi >/dev/null || return
    gpus=$(nvidia-smi -L 2>/dev/null | awk '/^GPU / { count++ } END { print count + 0 }')
    if ((gpus > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        # CUDA reads the list up to the first entry that names no device.
        gpus=$(awk -v list="$CUDA_VISIBLE_DEVICES" 'BEGIN {
            count = split(list, devices, ",")
            while (visible < count && devices[visible + 1] !~ /^ *(-.*)?$/) visible++
            print visible + 0
        }')
    fi
}

choose_accelerate_config() {
    local folder=$root/accelerate_configs found
    if [[ -z $accelerate_config ]]; then
        if ((nodes > 1)); then
            accelerate_config=multi_node_ddp
        elif ((gpus > 0)); then
            accelerate_config=gpu
            ((${PROCESSES_PER_NODE:-$gpus} > 1)) && accelerate_config=ddp
        else
            accelerate_config=cpu
            ((${PROCESSES_PER_NODE:-1} > 1)) && accelerate_config=cpu_2_processes
        fi
    fi
    if [[ -f $accelerate_config ]]; then
        return
    fi
    for found in "$folder/$accelerate_config.yaml" "$folder/$accelerate_config"; do
        if [[ -f $found ]]; then
            accelerate_config=$found
            return
        fi
    done
    found=$(cd "$folder" && printf '%s ' *.yaml)
    die "no accelerate config '$accelerate_config'; give a path, or a name of $folder: ${found//.yaml/}"
}

# Make the file `scratch`; the control folder of the ranks will stand beside it.
make_scratch() {
    local folder=${TMPDIR:-/tmp} said
    if said=$(mktemp "$folder/cellphase.XXXXXXXX" 2>&1); then
        scratch=$said
        # shellcheck disable=SC2064  # the name is to be expanded here
        trap "rm -rf -- $(printf '%q' "$scratch") $(printf '%q' "$scratch.d")" EXIT
        said=$(head -c "$LEAST_FREE_BYTES" /dev/zero 2>&1 >"$scratch") && : >"$scratch" && return
    fi
    die "TMPDIR=$folder takes no files of $LEAST_FREE_BYTES bytes (${said##*: }), and the ranks of this node need some" \
        "there; make room, or set TMPDIR to a folder on a local disk that you may write to"
}

# Check the environment, and read of the accelerate config what decides the command.
inspect() {
    local answer own_port=
    # The port is node 0's, and a dry run may be anywhere.
    ((node_rank > 0)) || [[ -n $dry_run ]] || own_port=$port
    answer=$("$python" - "$accelerate_config" "$root" "$own_port" 2>"$scratch" <<'PYTHON'
import importlib.util
import socket
import sys

path, root, port = sys.argv[1:]
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit("%s is Python %d.%d; 3.11 or 3.12 is needed; set PYTHON" % ((sys.executable,) + sys.version_info[:2]))
sys.path.insert(0, root)
needed = ["torch", "accelerate", "yaml", "pydantic", "omegaconf", "datasets", "pyarrow", "safetensors", "numpy"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("%s has no %s; run `make install` in %s, or set PYTHON" % (sys.executable, ", ".join(missing), root))
import yaml

try:
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
    sys.exit("%s cannot be read: %s" % (path, error))
if not isinstance(values, dict) or "distributed_type" not in values:
    sys.exit("%s is no configuration of accelerate: it has no distributed_type" % path)
kind = str(values["distributed_type"])
if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
    sys.exit("%s asks for DeepSpeed, and %s has none; run `make install`, or choose ddp" % (path, sys.executable))
# The shell reads what is printed as words and numbers, and would execute a `$(...)` in a number.
if not kind.replace("_", "").isalnum():
    sys.exit("%s: distributed_type is %r, which is none of accelerate's" % (path, kind[:80]))
if port:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", int(port)))
        except OSError as error:
            text = "MASTER_PORT=%s cannot be had on this node: %s; set it to a free port, the same for all nodes"
            sys.exit(text % (port, error.strerror))
processes = int(values.get("num_processes") or 0) // max(1, int(values.get("num_machines") or 1))
print({"False": "NO", "no": "NO"}.get(kind, kind), int(bool(values.get("use_cpu"))), max(0, processes))
PYTHON
    ) || die "$(tail -n 1 "$scratch")"
    read -r kind on_cpu processes_of_config <<<"$answer"
    if [[ $kind == DEEPSPEED ]]; then
        local compiler=${CXX:-c++}
        command -v "${compiler%% *}" >/dev/null ||
            die "$accelerate_config asks for DeepSpeed, which compiles operators, and there is no C++ compiler" \
                "'$compiler'; install one, or set CXX"
    fi
}

count_processes() {
    if [[ $kind == NO ]]; then
        processes=1
        ((nodes == 1)) || die "$accelerate_config starts one process on one node, and NODES=$nodes; choose multi_node_ddp"
        ((${PROCESSES_PER_NODE:-1} == 1)) ||
            die "$accelerate_config starts one process, and PROCESSES_PER_NODE=$PROCESSES_PER_NODE;" \
                "choose ddp, or cpu_2_processes for the CPU"
    elif [[ -n ${PROCESSES_PER_NODE:-} ]]; then
        processes=$PROCESSES_PER_NODE
        ((gpus == 0 || on_cpu || processes <= gpus)) ||
            die "PROCESSES_PER_NODE=$processes, but this node has $gpus GPUs; each process needs its own," \
                "unless the accelerate config says use_cpu: true"
    elif ((gpus > 0 && !on_cpu)); then
        processes=$gpus
    else
        processes=$processes_of_config
        ((processes > 0)) || die "$accelerate_config does not say num_processes; set PROCESSES_PER_NODE"
    fi
}

build_command() {
    command=("$python" -m accelerate.commands.launch --config_file "$accelerate_config"
        --num_machines "$nodes" --machine_rank "$node_rank" --num_processes "$((nodes * processes))")
    if ((nodes > 1)); then
        command+=(--rdzv_backend static --main_process_ip "$MASTER_ADDR")
        [[ $kind == DEEPSPEED ]] && command+=(--deepspeed_multinode_launcher standard)
    fi
    [[ -n $port ]] && command+=(--main_process_port "$port")
    environment=()
    if [[ $task == finetune ]]; then
        command+=(-m trainer finetune)
        environment+=("PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
    else
        command+=("$root/trainer/train.py")
    fi
    command+=(--config "$config" --resume ${trainer_arguments[@]+"${trainer_arguments[@]}"})
    # DeepSpeed calls ninja, which an environment that is not activated has beside its python.
    [[ :$PATH: == *":${python%/*}:"* ]] || environment+=("PATH=${python%/*}:$PATH")
    # The launcher answers a signal with SIGKILL to its ranks after 30 seconds; it shall leave them to this script.
    environment+=(PET_SIGNALS_TO_HANDLE=SIGQUIT)
}

print_command() {
    local variable
    printf '# repository %s, python %s\n' "$root" "$python"
    printf '# accelerate config %s, processes on this node %d, GPUs found %d\n' "$accelerate_config" "$processes" "$gpus"
    printf '# sets CELLPHASE_CONTROL=%q\n' "${TMPDIR:-/tmp}/cellphase.XXXXXXXX"
    for variable in "${environment[@]}"; do
        printf '# sets %s=%q\n' "${variable%%=*}" "${variable#*=}"
    done
    quoted "${command[@]}"
}

quoted() {
    local text
    text=$(printf '%q ' "$@")
    printf '%s\n' "${text% }"
}

# ---------------------------------------------------------------- this node

is_rank() {
    grep -qzxsF "CELLPHASE_CONTROL=$control" "/proc/$1/environ"
}

# Print the process ids of this node's ranks that have not ended.
live_ranks() {
    local file pid
    for file in "$control"/rank*.runs.*; do
        [[ -f $file ]] || continue
        pid=${file##*.}
        # A process id is used again some time after its process has ended.
        is_rank "$pid" && printf '%s\n' "$pid"
    done
}

is_asked() {
    compgen -G "$control/preempt.*" >/dev/null
}

# Ask the ranks for a checkpoint and an end, because of $1; the first reason stands. The file comes before the signals:
# a rank that starts later finds it, and those that are told by SIGTERM what this script was told itself.
ask_ranks() {
    is_asked || : >"$control/preempt.$1"
    local pid pids
    pids=$(live_ranks)
    for pid in $pids; do
        kill -TERM "$pid" 2>/dev/null
    done
}

# Kill the launcher and its ranks, and leave rank<N>.killed.<process id> of those that still ran.
kill_all() {
    local file pid
    for file in "$control"/rank*.runs.*; do
        pid=${file##*.}
        is_rank "$pid" && mv -- "$file" "${file%.runs.*}.killed.$pid" 2>/dev/null
    done
    # All descendants have the variable, whatever session or parent they have now; this script has it not.
    grep -lzxsF "CELLPHASE_CONTROL=$control" /proc/[0-9]*/environ | while read -r file; do
        file=${file#/proc/}
        kill -KILL "${file%/environ}" 2>/dev/null
    done
}

# shellcheck disable=SC2329  # called by a trap
on_node_signal() {
    signalled=1
    if [[ $1 == INT ]]; then
        interrupts=$((interrupts + 1))
        if ((interrupts > 1)); then
            say "interrupted twice: ends at once, without a checkpoint"
            kill_all
            return
        fi
    fi
    if ! is_asked; then
        say "SIG$1: asks the ranks for a checkpoint and waits for them, for at most $save_seconds seconds" \
            "(CELLPHASE_SAVE_SECONDS)"
    fi
    ask_ranks "SIG$1"
}

# Start a command out of the reach of what the terminal or SLURM sends to process groups. A launcher that SLURM
# signals all the same ignores it: it would die and leave its ranks behind, or kill them before they have saved.
start() {
    "$python" -c '
import os, signal, sys
os.setsid()
if sys.argv[1] == "deaf":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
os.execvp(sys.argv[2], sys.argv[2:])
' "$@" &
    child=$!
}

# Set `code` to the child's exit code once it is really gone: `wait` returns early whenever a trap has run.
wait_for_child() {
    local status
    code=
    while :; do
        signalled=
        wait "$child" 2>/dev/null
        status=$?
        [[ $status -eq 127 && -n $code ]] && break
        code=$status
        [[ -n $signalled ]] || break
    done
}

trap_signals() {
    local name
    interrupts=0
    for name in TERM USR1 HUP INT; do
        # shellcheck disable=SC2064  # the name is to be expanded here
        trap "$1 $name" "$name"
    done
}

run_node() {
    control=$scratch.d
    mkdir -m 700 -- "$control" || exit 1
    trap_signals on_node_signal
    if [[ -n $early ]]; then
        on_node_signal "$early"
    fi
    if ((nodes > 1)); then
        say "node $node_rank of $nodes (${HOSTNAME:-}): $processes of $((nodes * processes)) processes, which meet at" \
            "$MASTER_ADDR:$port"
    fi
    attend &
    attendant=$!
    start deaf env -u CELLPHASE_SLURM_NODE "CELLPHASE_CONTROL=$control" "${environment[@]}" "${command[@]}"
    wait_for_child
    if ((code > 128)); then
        sleep 1 # a rank that has just started may not have left its process id yet
    fi
    wait_for_ranks
    answer
    if ((result == USER_MISTAKE || result == 1)); then
        tell_ends
    fi
    trap '' TERM USR1 HUP INT
    rm -rf -- "$control" # the attendant ends with it
    wait "$attendant"
}

# Let a second pass, unless the script has ended.
still_attends() {
    sleep 1 && [[ -d $control && -d /proc/$$ ]]
}

# Attend to the node in the background: first to a launcher whose ranks have not begun, then to ranks that do not end.
attend() {
    trap '' TERM USR1 HUP INT
    wait_for_begin && wait_for_end
}

# Wait until a rank begins, or end the launcher: it waits for the other nodes for many minutes, silently, and is deaf.
wait_for_begin() {
    local second=0 asked=0 place="the other nodes at ${MASTER_ADDR:-}:$port"
    while still_attends; do
        compgen -G "$control/rank*" >/dev/null && return
        second=$((second + 1))
        if is_asked && ((++asked > BEGIN_SECONDS)); then
            say "no rank has begun, so there is nothing to save: ends"
            kill_all
            break
        fi
        ((nodes > 1)) || continue
        if ((second >= meet_seconds)); then
            say "node $node_rank has waited $second seconds in vain for $place: ends; start all $nodes nodes within" \
                "this time of each other, or set CELLPHASE_MEET_SECONDS to more"
            kill_all
            break
        elif ((second == PATIENCE_SECONDS || second % (5 * PATIENCE_SECONDS) == 0)); then
            say "node $node_rank still waits for $place: have all $nodes been started, with this MASTER_ADDR and" \
                "MASTER_PORT, and can they reach it? Ends after $meet_seconds seconds (CELLPHASE_MEET_SECONDS)," \
                "of which $second have passed"
        fi
    done
    return 1
}

# Kill ranks that do not end, after they were asked to or after ranks of other nodes have given the run up: one that is
# stopped, or hangs below Python, answers to nothing else, and nobody else sees it.
wait_for_end() {
    local second=0 asked='' failed=''
    failure=''
    while still_attends; do
        second=$((second + 1))
        is_asked && asked=${asked:-$second}
        if [[ -z $failed ]] && ((second % LOOK_SECONDS == 0)) && has_failed; then
            failed=$second
        fi
        if [[ -n $asked ]] && ((second - asked >= save_seconds)); then
            say "ranks still run $save_seconds seconds after they were asked to end (CELLPHASE_SAVE_SECONDS): kills them"
        elif [[ -n $failed ]] && ((second - failed >= ORPHAN_SECONDS)); then
            say "ranks still run $ORPHAN_SECONDS seconds after the run has failed: kills them; it failed because $failure"
        else
            continue
        fi
        kill_all
        return
    done
}

# Tell whether a rank has left a reason why the run failed, and set `failure` to it. The run folder's disk may hang.
has_failed() {
    local run
    run=$(cat -- "$control/run_folder" 2>/dev/null) || return
    failure=$(timeout -s KILL "$LOOK_SECONDS" \
        find "$run/heartbeats" -maxdepth 1 -name 'failure.*.json' -exec head -qc 2000 {} + 2>/dev/null)
    failure=${failure#'{"reason": "'} failure=${failure%'"}'}
    [[ -n $failure ]]
}

# Say last how the ranks ended: launchers end with a traceback of their own, which calls each node's first rank the
# root cause.
tell_ends() {
    timeout -s KILL 60 "$python" -u - "$control" "$code" "$result" >&2 <<'PYTHON' # the run folder's disk may hang
import json
import pathlib
import sys

folder, ends, run = pathlib.Path(sys.argv[1]), {}, None


def text_of(path):
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


for file in folder.glob("rank*.*.*[0-9]"):
    rank, state, code = file.name[len("rank"):].split(".")
    rank = int(rank)
    try:
        account = json.loads((folder / ("rank%d.exit.json" % rank)).read_text())
        reason = account["reason"]
        run = account["run_folder"] or run
    except (OSError, ValueError, KeyError):
        reason = "why could not be written to %s; is it full?" % folder.parent
    end = "ended with %s: %s" % (code, reason)
    if state == "runs":
        end = "left no account of its end: it was killed, or memory ran out (see the kernel's log)"
    elif state == "killed":
        end = "did not end by itself: launch.sh killed it"
    ends.setdefault("".join(letter if letter.isprintable() else " " for letter in end)[:2000], []).append(rank)
for end, ranks in sorted(ends.items(), key=lambda item: min(item[1])):
    text = ", ".join(map(str, sorted(ranks)))
    print("launch.sh: rank%s %s %s" % ("" if len(ranks) == 1 else "s", text, end))
if not ends:
    print("launch.sh: no rank of this node began; the launcher ended with %s" % sys.argv[2])
run = text_of(folder / "run_folder") or run
if run is not None:
    print("launch.sh: run folder %s" % run)
if sys.argv[3] != "1":
    sys.exit()
newest = "" if run is None else text_of(pathlib.Path(run, "latest"))
if newest and pathlib.Path(run, newest, "manifest.json").is_file():
    print("launch.sh: the last complete checkpoint is %s; the same command goes on from it" % newest)
elif run is not None:
    print("launch.sh: there is no complete checkpoint yet; the same command starts again")
else:
    print("launch.sh: the run was not opened; the same command starts again")
PYTHON
}

# Where the launcher was killed, its ranks live on: they may save what they have.
wait_for_ranks() {
    local pids end=$((SECONDS + ORPHAN_SECONDS))
    pids=$(live_ranks)
    if [[ -n $pids ]]; then
        say "the launcher is gone (exit code $code) and ranks still run: asks them for a checkpoint"
        ask_ranks "the end of the launcher"
    fi
    while pids=$(live_ranks) && [[ -n $pids ]]; do
        if ((SECONDS >= end)); then
            say "ranks still run after $ORPHAN_SECONDS seconds: kills them"
            kill_all
            return
        fi
        sleep 0.2
    done
}

# Set `result` to the exit code of this node: launchers turn every failure into 1, the ranks' files say which it was.
answer() {
    local file codes=" "
    result=1
    if ((code == 0)); then
        result=0
        return
    fi
    if ((interrupts > 1)); then
        result=$INTERRUPTED
        return
    fi
    for file in "$control"/rank*.*.*[0-9]; do
        case ${file##*/} in
            *.exited.*) codes+="${file##*.} " ;;
            *.runs.* | *.killed.*) codes+="none " ;;
        esac
    done
    if [[ $codes == *" $USER_MISTAKE "* ]]; then
        result=$USER_MISTAKE
    elif [[ $codes == *" $INTERRUPTED "* ]]; then
        result=$INTERRUPTED
    elif [[ $codes =~ ^\ (0\ )*$PREEMPTED\ ((0|$PREEMPTED)\ )*$ ]]; then
        result=$PREEMPTED # others may have been done while the first rank still scored
    elif [[ $codes == " " ]] && is_asked; then
        result=$PREEMPTED # before any rank began
    elif ((code > 128)) && [[ $codes =~ ^\ (0\ )+$ ]]; then
        result=0 # the launcher was killed, and its ranks finished all the same
    fi
}

# ---------------------------------------------------------------- SLURM

# Run this script on every node of the job.
build_slurm_command() {
    command -v srun >/dev/null || die "SLURM_JOB_ID is set, but there is no srun on PATH"
    step=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --export=ALL)
    # Neither one node's failure nor its end ends the others': rank 0 may save or score when they are done.
    slurm_command=("${step[@]}" --kill-on-bad-exit=0 --wait=0)
    # A step does not take this from the job.
    [[ -n ${SLURM_CPUS_PER_TASK:-} ]] && slurm_command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # After `env`: so it is the tasks' alone, and not srun's, which tell_nodes must not find.
    slurm_command+=(env "CELLPHASE_SLURM_NODE=$SLURM_JOB_ID" "NODES=$nodes" "MASTER_ADDR=$MASTER_ADDR"
        "MASTER_PORT=$port" "PROCESSES_PER_NODE=$processes" "PYTHON=$python"
        bash "$root/launch.sh" "--accelerate-config=$accelerate_config" "$task" "$config"
        ${trainer_arguments[@]+"${trainer_arguments[@]}"})
}

# Signal launch.sh on every node with SIG$1, and nothing else there. srun would pass a signal to every process of the
# step, also to those that load data, which die of it; and SIGTERM would make it kill them all.
# shellcheck disable=SC2329  # called by a trap
tell_nodes() {
    # shellcheck disable=SC2016  # expanded on the nodes
    "${step[@]}" --overlap bash -c '
found=1
for file in $(grep -lzxsF "CELLPHASE_SLURM_NODE=$SLURM_JOB_ID" /proc/[0-9]*/environ); do
    file=${file#/proc/}
    kill "-$1" "${file%/environ}" 2>/dev/null && found=0
done
exit "$found"' - "$1" </dev/null
}

# shellcheck disable=SC2329  # called by a trap
on_job_signal() {
    local name=$1
    signalled=1
    if [[ $1 == INT ]]; then
        name=TERM # the nodes may have been started with SIGINT ignored
        interrupts=$((interrupts + 1))
        if ((interrupts > 1)); then
            say "interrupted twice: ends at once, without a checkpoint"
            kill -TERM "$child" 2>/dev/null
            return
        fi
    fi
    say "SIG$1: asks all nodes for a checkpoint and waits for them"
    if ! tell_nodes "$name"; then
        say "the nodes could not be told by a step of their own; SIGUSR1 goes to the whole step instead"
        kill -USR1 "$child" 2>/dev/null
    fi
}

run_job() {
    trap_signals on_job_signal
    start attentive "${slurm_command[@]}"
    wait_for_child
    case $code in
        0 | "$USER_MISTAKE" | "$PREEMPTED" | "$INTERRUPTED") result=$code ;;
        *) result=1 ;;
    esac
}

# Put the job back into the queue, so that the same run goes on; not against somebody who cancelled it.
requeue() {
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    if [[ $state == CANCELLED* ]]; then
        say "job $SLURM_JOB_ID was cancelled: it is not requeued; its checkpoint stays"
        return
    fi
    # SLURM ends this script as soon as the job is requeued.
    trap '' TERM USR1 HUP INT
    say "requeues job $SLURM_JOB_ID, to go on from its checkpoint"
    scontrol requeue "$SLURM_JOB_ID" || say "job $SLURM_JOB_ID was not requeued; start it again to go on"
}

first_host() {
    local host
    read -r host < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-}") && printf '%s' "$host"
}

# Say what this process is for: `node`, or `job` where it has to start itself on the nodes of a SLURM job.
find_role() {
    role=node is_batch=''
    if [[ -n ${CELLPHASE_SLURM_NODE:-} && $CELLPHASE_SLURM_NODE == "${SLURM_JOB_ID:-}" ]]; then
        NODE_RANK=${SLURM_NODEID:?}
        return
    fi
    [[ -n ${SLURM_JOB_ID:-} && -z ${NODES:-} ]] || return
    [[ ${SLURM_NTASKS_PER_NODE:-1} == 1 ]] ||
        die "SLURM_NTASKS_PER_NODE=$SLURM_NTASKS_PER_NODE; submit with --ntasks-per-node=1: launch.sh starts the" \
            "processes of a node itself (PROCESSES_PER_NODE)"
    NODES=${SLURM_JOB_NUM_NODES:-1}
    NODE_RANK=0
    is_batch=1
    if [[ $NODES != 1 ]]; then
        [[ ${ENVIRONMENT:-} == BATCH || -z ${SLURM_STEP_ID:-} ]] ||
            die "this is a step of job $SLURM_JOB_ID; start launch.sh in the batch script itself, it calls srun"
        role=job
        MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
        [[ -n ${MASTER_ADDR:-} ]] || MASTER_ADDR=$(first_host)
        [[ -n $MASTER_ADDR ]] ||
            die "scontrol show hostnames '${SLURM_JOB_NODELIST:-}' named no host; set MASTER_ADDR to that of node 0"
    fi
}

main() {
    local name
    early=''
    for name in TERM USR1 HUP; do
        # shellcheck disable=SC2064  # the name is to be expanded here
        trap "early=$name" "$name"
    done
    find_repository
    parse_command_line "$@"
    find_role
    find_python
    check_numbers
    count_gpus
    choose_accelerate_config
    make_scratch
    inspect
    count_processes
    build_command
    [[ $role == job ]] && build_slurm_command
    if [[ -n $dry_run ]]; then
        if [[ $role == job ]]; then
            quoted "${slurm_command[@]}"
            printf '# which runs on node 0, and likewise on the others:\n'
        fi
        print_command
        exit 0
    fi
    if [[ $role == job ]]; then
        run_job
    else
        run_node
    fi
    if ((result == PREEMPTED)); then
        say "ended as it was asked to; the same command goes on"
        [[ -n $is_batch ]] && requeue
    fi
    exit "$result"
}

main "$@"
