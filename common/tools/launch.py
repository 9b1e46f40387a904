"""`accelerate launch` for scripts/launch.sh: a process that fails has said why, and the launcher adds nothing to it.

With `--dry_run` among the program's words nothing is started: where it would run is shown, as accelerate reads it, with
what `common.tools.train --dry_run` prints.
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys

from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.commands.launch import main as accelerate_launch
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common.config.errors import run_cli
from common.config.loader import load_settings, parse_launch_line
from common.tools.train import print_plan


def main() -> int:
    """Exit code of the first process that failed, 0 if none did."""
    arguments = launch_command_parser().parse_args()
    if "--dry_run" in arguments.training_script_args:
        dry_run(arguments)
        return 0
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        accelerate_launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say anything
            sys.stderr.write(f"error: process {rank} was ended by signal {-failure.exitcode}\n")
        return abs(failure.exitcode)
    except subprocess.CalledProcessError as error:
        return abs(error.returncode)
    return 0


def dry_run(arguments: argparse.Namespace) -> None:
    """Prints the plan of the run that accelerate's parser has made `arguments` of."""
    config_path, _, overrides = parse_launch_line(arguments.training_script_args)
    accelerate_config = load_config_from_file(arguments.config_file)
    # accelerate runs DDP on CPUs, whatever its config says.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true"
    is_sharded = accelerate_config.distributed_type == DistributedType.FSDP and not on_cpu
    words = [word for word in sys.argv[1:] if word != "--dry_run"]
    layout = {
        "machines": arguments.num_machines,
        "machine rank": arguments.machine_rank,
        "models": "sharded among the processes (FSDP2)" if is_sharded else "whole in every process (DDP)",
        "accelerate config": arguments.config_file,
        "command": shlex.join([sys.executable, "-m", "common.tools.launch", *words]),
    }
    print_plan(load_settings(config_path, overrides), arguments.num_processes, layout)


if __name__ == "__main__":
    run_cli(main)
