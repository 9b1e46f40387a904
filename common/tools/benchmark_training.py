"""How fast a stage trains, and in how much memory: its own objective and optimizer in the trainer's own step.

    python -m common.tools.make_model --size 2b --stage 2 --small_text_encoder --output_dir models/random-2b-stage2
    python -m common.tools.benchmark_training --config stage3/training/sft_config.py --frames 33
        --model_path models/random-2b-stage2 --compile --gradient_checkpointing 10 --output stage3.json
    python -m common.tools.benchmark_training --config stage3/training/sft_config.py
        --model_path models/random-2b-stage2 --try "eager:" --try "compiled: --compile" --losses 50

Takes a training config and overrides of its settings as training does. What a latent cache would give is drawn at
random and lies on the device: no video is read, nothing is encoded or decoded. It shows a table and writes --output.

Seconds a step are the median over --steps after --warmup, between events on the device. TFLOP/s count a forward and a
backward without recomputation; MFU is their share of what a bf16 product of 8192³ reaches on the same GPU just before.
Memory is the most that the steps take (allocated, and reserved by PyTorch), warm-up included; "loading" is the most
that it took to make the models.

Each --try "name: --setting value …" is a run in a process of its own with these words added, and a row of one table;
one that runs out of memory says so in its row. --losses N shows the losses of the first N steps, which depend on the
seed and not on how they are computed: compiled and eager runs can be compared. Several GPUs: accelerate launch -m …,
without --try.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common.cogvideox.loading import COUNT
from common.config.command_line import ArgumentParser, refuse_unwritable, whole_number
from common.config.errors import UserError, is_out_of_memory, one_line, run_cli
from common.config.loader import load_settings
from common.config.settings import TrainingSettings
from common.tools.benchmark_timing import device_clock, surroundings
from common.tools.benchmark_training_table import losses_table, summary, table
from common.tools.train import OUT_OF_MEMORY_HELP
from common.training.random_batches import random_batches
from common.training.throughput import measured_product, peak_memory_gib
from common.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
GIB = 2**30
MODULE = "common.tools.benchmark_training"


def training_settings(args: argparse.Namespace, overrides: list[str], scratch: str) -> TrainingSettings:
    """The config with its overrides, one size of window, and without all that is not the step."""
    words = ["--pretrained_model_name_or_path", args.model_path]
    words += ["--frame_buckets", str(args.frames)] if args.frames else []
    words += ["--train_batch_size", str(args.batch_size)] if args.batch_size else []
    # As with a cache: the text encoder leaves memory when it has encoded the empty caption.
    aside = f"--output_dir {scratch} --latent_cache_dir {scratch} --windows_per_clip 1 --report_to none"
    aside += " --resume_from_checkpoint none --validation_steps 0 --validation_prompts"
    settings = load_settings(args.config, [*words, *overrides, *aside.split()])
    for name in ("frame_buckets", "height_buckets", "width_buckets"):
        setattr(settings, name, [max(getattr(settings, name))])
    return settings


def benchmark(settings: TrainingSettings, steps: int, warmup: int, num_losses: int) -> dict[str, Any]:
    """Trains on random batches; → figures of a row."""
    objective = settings.build_objective()
    sizes = objective.describe()
    trainer = Trainer(settings, objective, build_loader=random_batches)
    started = time.perf_counter()
    try:
        trainer.set_up(checkpoint=None, control=None)
        device = trainer.accelerator.device
        loading = peak_memory_gib(device)
        product = measured_product(device)
        trainer.peak_flops = product["flops_per_s"]  # has the trainer count operations on any device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        losses = []
        for _ in range(max(warmup, num_losses)):
            trainer.train_step()
            losses.append(read_loss(trainer))
        ready = time.perf_counter() - started
        seconds, tokens, flops = time_steps(trainer, steps)
        loss = read_loss(trainer)
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(trainer.out_of_memory_advice()) from error
        raise
    processes = trainer.accelerator.num_processes
    step_seconds = statistics.median(seconds)
    samples = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    figures = {
        "frames": settings.frame_buckets[0],
        "height": settings.height_buckets[0],
        "width": settings.width_buckets[0],
        "samples_per_step": samples,
        "processes": processes,
        "parameters": sizes["parameters"],
        "trained_parameters": sizes["trained parameters"],
        "s_per_step": step_seconds,
        "samples_per_s": samples / step_seconds,
        "video_tokens_per_s": tokens / step_seconds,
        "tflops_per_s": flops / step_seconds / 1e12,
        "mfu": flops / step_seconds / (product["flops_per_s"] * processes),
        **peak_memory(device),
        "peak_loading_gib": loading,
        "ready_s": ready,
        "loss": loss,
        "losses": losses,
        "step_seconds": seconds,
        "product": product,
        **surroundings(device),
        "settings": settings.to_dict(),
    }
    if processes > 1:
        # PyTorch joins gloo's threads while it holds the interpreter, which they need to drop their last tensors.
        time.sleep(0.2)
    trainer.accelerator.end_training()
    return figures


def read_loss(trainer: Trainer) -> float:
    """The mean loss since the last reading; waits for the device, and a `UserError` if a step's was not finite."""
    trainer.state.guard.check(trainer.accelerator)
    return trainer.state.means.read(trainer.accelerator)["loss"]


def time_steps(trainer: Trainer, steps: int) -> tuple[list[float], int, float]:
    """Seconds of each step, and a step's video tokens and operations."""
    mark, read = device_clock(trainer.accelerator.device)
    trainer.wait_for_device()
    marks = [mark()]
    for _ in range(steps):
        tokens, flops = trainer.train_step()
        marks.append(mark())
    trainer.wait_for_device()
    return [milliseconds / 1000 for milliseconds in read(marks)], tokens, flops


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """In GiB. "device_used_gib" is of all processes on the GPU, with what CUDA itself takes."""
    figures = {"peak_allocated_gib": peak_memory_gib(device), "peak_reserved_gib": None, "device_used_gib": None}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        figures["device_used_gib"] = (total - free) / GIB
    return figures


def run_trial(name: str, words: list[str]) -> dict[str, Any]:
    """A run in a process of its own; → its row, which has "error" instead of figures if it failed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "row.json"
        command = [sys.executable, "-m", MODULE, *words, "--output", str(output)]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True
        )
        if done.returncode == 0:
            return json.loads(output.read_text())["rows"][0] | {"name": name}
    if done.returncode < 0:
        error = f"ended by signal {-done.returncode}, perhaps for want of the host's memory"
    else:
        if done.returncode != 2:  # a bug, and no mistake of the user's
            sys.stderr.write(done.stderr)
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        error = one_line(lines[-1]).removeprefix("error: ")
    return {"name": name, "error": error, "out_of_memory": error.startswith("out of memory")}


def parse_trials(texts: list[str]) -> list[tuple[str, list[str]]]:
    """ "name: --setting value" → (name, words)."""
    trials = []
    for text in texts:
        name, colon, words = text.partition(":")
        if not colon or not name.strip():
            raise UserError(f'--try {text!r}: write a name, a colon, and settings: "compiled: --compile"')
        trials.append((name.strip(), shlex.split(words)))
    if len({name for name, _ in trials}) < len(trials):
        raise UserError("--try: two runs have the same name")
    return trials


def parse_arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own options, and what is left: overrides of settings."""
    parser = ArgumentParser(__doc__)
    parser.allow_abbrev = False  # --step could be a setting
    parser.add_argument("--config", required=True, help="a stage's config module")
    parser.add_argument("--model_path", required=True, help="pipeline directory that the stage starts from (or hub id)")
    parser.add_argument("--frames", type=COUNT, help="raw frames of a clip; by default the config's longest")
    parser.add_argument("--batch_size", type=COUNT, help="samples per process and micro-step; by default the config's")
    parser.add_argument("--steps", type=COUNT, default=10, help="steps that count")
    parser.add_argument("--warmup", type=COUNT, default=5, help="steps before them")
    parser.add_argument("--losses", type=whole_number(0), default=0, help="show the losses of so many first steps")
    parser.add_argument("--try", dest="trials", action="append", default=[], help='"name: --setting value …": a row')
    parser.add_argument("--output", type=Path, default=Path("benchmark_training.json"), help="JSON file to write")
    args, overrides = parser.parse_known_args(words)
    if args.output.suffix != ".json" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .json")
    refuse_unwritable(args.output.parent, "--output")
    if args.trials and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--try starts a process for each run; on several GPUs start one run after the other")
    return args, overrides


def without_trials(words: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--try", action="append")
    return parser.parse_known_args(words)[1]


def run_trials(trials: list[tuple[str, list[str]]], words: list[str], output: Path) -> list[dict[str, Any]]:
    """A row for each, written as soon as it is there; what is wrong in a setting is said before the first one runs."""
    for _, more in trials:
        training_settings(*parse_arguments([*words, *more]), tempfile.gettempdir())
    rows = []
    for name, more in trials:
        rows.append(run_trial(name, [*words, *more]))
        write(rows, output)
        print(summary(rows[-1]), flush=True)
    return rows


def write(rows: list[dict[str, Any]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def main() -> int:
    """The exit code is 1 where a run failed for anything but want of memory."""
    words = sys.argv[1:]
    args, overrides = parse_arguments(words)
    if args.trials:
        rows = run_trials(parse_trials(args.trials), without_trials(words), args.output)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            settings = training_settings(args, overrides, scratch)
            stage = Path(args.config).resolve().parents[1].name
            rows = [{"name": stage} | benchmark(settings, args.steps, args.warmup, args.losses)]
    if int(os.environ.get("RANK", "0")):
        return 0
    write(rows, args.output)
    print(table(rows))
    if args.losses:
        print(losses_table(rows, args.losses))
    print(f"written to {args.output}")
    return int(any(row.get("out_of_memory") is False for row in rows))


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
