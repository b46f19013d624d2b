"""`aligned-reid launch`: run a command or a script as several ranks; see aligned_reid/launcher.py."""

import os
import signal
import sys
from argparse import REMAINDER, Namespace
from contextlib import suppress
from pathlib import Path

from aligned_reid.cli import OneLineParser, parse_path, program_name
from aligned_reid.commands import COMMANDS
from aligned_reid.config import Config
from aligned_reid.errors import InputError
from aligned_reid.files import can_write
from aligned_reid.launcher import launch
from aligned_reid.lock import hold
from aligned_reid.stop import STOP_SIGNALS


def parse_arguments() -> Namespace:
    """Options up to the command; the rest is the command's. Defaults for several machines are torchrun's variables."""
    parser = OneLineParser(allow_abbrev=False, description="Run a command or a script as one process a device.")
    nnodes, node_rank, device = variable("NNODES", "1"), variable("NODE_RANK", "0"), os.environ.get("ASCEND_DEVICE_ID")
    parser.add_argument("--nproc", type=int, default=1, help="processes on this machine (default: 1)")
    parser.add_argument("--nnodes", type=int, default=nnodes, help="machines (default: NNODES, or 1)")
    parser.add_argument("--node_rank", type=int, default=node_rank, help="this machine (default: NODE_RANK, or 0)")
    parser.add_argument("--addr", default="", help="address of the first of several machines (default: MASTER_ADDR)")
    parser.add_argument("--port", type=int, default=0, help="its port (default: MASTER_PORT, or 29500)")
    parser.add_argument(
        "--log_dir", type=parse_path, default="logs", help="the ranks' logs: <log_dir>/<device>/train_<device>.log"
    )
    parser.add_argument("--first_device", type=int, default=device or None, help="default: ASCEND_DEVICE_ID, or 0")
    parser.add_argument("--max_restarts", type=int, default=0, help="start again after a rank's death (default: 0)")
    parser.add_argument("--check", default="true", choices=["true", "false", "only"], help="check the input first")
    parser.add_argument("command", nargs=REMAINDER, help="train, extract or a Python script, and its arguments")
    options = parser.parse_args()
    options.endpoint = ""
    if options.nnodes > 1:
        options.addr = options.addr or variable("MASTER_ADDR", "")
        port = variable("MASTER_PORT", "29500")
        if not port.isdecimal():
            parser.error(f"MASTER_PORT is {port!r}, not a whole number from 0 to 65535")
        options.port = options.port or int(port)
        options.endpoint = f"{options.addr}:{options.port}"
    if options.first_device is None:
        options.first_device = options.node_rank * options.nproc
    named = options.command[:1]
    rules = [
        (named, f"which script or command? e.g. {program_name()} --nproc=2 train --data_path=..."),
        (options.nproc >= 1, "--nproc is at least 1"),
        (0 <= options.node_rank < options.nnodes, "--node_rank counts from 0 to --nnodes - 1"),
        (options.max_restarts >= 0, "--max_restarts is 0 or more"),
        (options.first_device >= 0, "--first_device is 0 or more"),
        (0 <= options.port < 65536, "--port is from 0 to 65535"),
        (options.nnodes == 1 or options.addr, "several machines need --addr (or MASTER_ADDR), the first one's address"),
        (not named or named[0] in COMMANDS or Path(named[0]).is_file(), f"there is no script {' '.join(named)}"),
    ]
    for holds, rule in rules:
        if not holds:
            parser.error(rule)
    return options


def variable(name: str, default: str) -> str:
    return os.environ.get(f"PET_{name}") or os.environ.get(name) or default


def check_input(config: Config, options: Namespace) -> None:
    """Check the input once, before ranks start; with --check=only, the device too."""
    from aligned_reid import preflight
    from aligned_reid.distributed import World
    from aligned_reid.run import open_devices

    preflight.check_input(config, World(rank=options.node_rank))
    if options.node_rank == 0:
        with hold(config.run_dir, "--exp_dir"):  # it is free
            pass
    if options.check == "only":  # this process ends then; a launcher would keep the device busy
        open_devices(config, World(local_rank=options.nproc - 1))


def main() -> None:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # before torch: a broken torch_npu would stop its import
    # torch's agent handles signals that are ignored, such as SIGHUP under nohup. Threads and ranks inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, [one for one in STOP_SIGNALS if signal.getsignal(one) is signal.SIG_IGN])
    options, name = parse_arguments(), program_name()
    is_command = options.command[0] in COMMANDS
    has_agent = options.nproc * options.nnodes > 1 or options.max_restarts  # a single process checks its input itself
    is_train = options.command[0] == "train"
    if Path(sys.argv[0]).name == "launch.py":  # a user's own train.py may take any arguments
        is_train |= Path(options.command[0]).absolute() == Path(sys.argv[0]).absolute().with_name("train.py")
    if is_train:
        # errors from here on are reported in the name of train.py or aligned-reid train
        sys.argv = ["aligned-reid train" if is_command else options.command[0], *options.command[1:]]
        if options.check == "only" or (has_agent and options.check == "true"):
            check_input(Config.from_arguments(options.command[1:]), options)
    if options.check == "only":
        return
    with suppress(OSError):
        options.log_dir.mkdir(parents=True, exist_ok=True)
    if not can_write(options.log_dir):
        raise InputError(f"--log_dir {options.log_dir} is not a folder that can be written to; choose another one")
    status = launch(
        [str(Path(__file__).parents[1] / "__main__.py"), *options.command] if is_command else options.command,
        options.nproc,
        options.log_dir,
        num_nodes=options.nnodes,
        node_rank=options.node_rank,
        endpoint=options.endpoint,
        first_device=options.first_device,
        max_restarts=options.max_restarts,
        name=name,
    )
    sys.exit(status)
