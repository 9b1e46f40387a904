"""`accelerate launch` for scripts/launch.sh: a process that fails has said why, and the launcher adds nothing to it."""

import logging
import subprocess
import sys

from accelerate.commands.launch import main as accelerate_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Exit code of the first process that failed, 0 if none did."""
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


if __name__ == "__main__":
    sys.exit(main())
