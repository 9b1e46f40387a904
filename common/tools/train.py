"""Trains a stage: `accelerate launch -m common.tools.train --config PATH [--dry_run] [--name value …]`.

`--config` is a stage's config module, `--name value` sets one of its settings for this run, `--dry_run` prints the
settings and what follows from them (tokens, windows, steps per epoch, parameter counts) and leaves: no weights are
loaded and nothing is written. `--check` says only what is wrong, files included: scripts/launch.sh asks so before it
starts several processes, each of which would say it. On one device `python -m common.tools.train …` does the same
without a launcher. Several processes have the dry run of common.tools.launch.
"""

import json
import logging
import os
import shlex
import signal
import sys
import time
from typing import Any

from common.config.errors import UserError, run_cli
from common.config.loader import load_settings, parse_launch_line
from common.config.settings import TrainingSettings

# Seconds that the other processes wait before they say what is wrong: if the first has met the same, it says so and the
# launcher ends them.
FIRST_SPEAKS_FIRST = 5.0
OUT_OF_MEMORY_HELP = (  # while models are loaded; a step that does not fit names what this run can lower
    "out of memory: lower train_batch_size, frame_buckets or height_buckets/width_buckets, turn on "
    "gradient_checkpointing, or encode the videos once with common.tools.precompute and set latent_cache_dir"
)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # scripts/launch.sh has its launcher, our parent, ignore them
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    is_main = int(os.environ.get("RANK", "0")) == 0
    words = sys.argv[1:]
    check_only = "--check" in words
    try:
        config_path, dry_run, overrides = parse_launch_line([word for word in words if word != "--check"])
        settings = load_settings(config_path, overrides)
        if not dry_run:
            settings.check_files()
            objective = settings.build_objective()
            objective.describe()  # refuses what the base's configs show to be wrong
    except UserError:
        if is_main:
            raise
        sys.exit(2)  # all processes read the same settings: one of them says what is wrong with them
    if dry_run:
        if is_main:
            line = shlex.join([sys.executable, "-m", "common.tools.train", *(w for w in words if w != "--dry_run")])
            print_plan(settings, 1, {"machines": 1, "command": line})
        return
    if check_only:
        from common.data.loader import describe_data

        describe_data(settings, objective.needs_control, int(os.environ.get("WORLD_SIZE", "1")))
        return
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(asctime)s %(message)s")

    from common.training.trainer import Trainer

    try:
        Trainer(settings, objective).train()
    except UserError:
        if not is_main:
            time.sleep(FIRST_SPEAKS_FIRST)
        raise


def print_plan(settings: TrainingSettings, num_processes: int, layout: dict[str, Any]) -> None:
    """Prints the settings, and what follows from them, the base's configs and the index, as JSON.

    Args:
        layout: where the processes would run.
    """
    from common.data.loader import describe_data

    samples = settings.train_batch_size * settings.gradient_accumulation_steps * num_processes
    objective = settings.build_objective()
    data: dict[str, Any] = {"index_file": f"{settings.index_file or 'not set'} (not on this disk)"}
    if os.path.exists(settings.index_file):
        data = describe_data(settings, objective.needs_control, num_processes)
    plan = {
        "launch": {"processes": num_processes, "samples per optimizer step": samples, **layout},
        "settings": settings.to_dict(),
        "model": objective.describe(),
        "data": data,
    }
    print(json.dumps(plan, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
