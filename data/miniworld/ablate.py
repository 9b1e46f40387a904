r"""What helps? Trains a stage of the mini world once for each arm and seed, all equally long, and measures every one.

    python -m data.miniworld.ablate --stage 3 --pretrained_model_name_or_path outputs/miniworld_gpu/stage2 \
        --output_dir outputs/ablation3 --seeds 0 1 2 -- --max_train_steps 2000 --train_batch_size 64 \
        --data_root outputs/miniworld_gpu/world --latent_cache_dir outputs/miniworld_gpu/latents97 …

Behind `--` stand settings for every arm, as on the stage's launch line; an arm's own come after them. OUT/ARM/SEED
holds a run and OUT/ARM/SEED/report its evaluation; OUT/ablation.md and .json set the arms side by side. What is there
already is kept, so the same command goes on where it was stopped, and several machines may share the work by --arms and
--seeds. A command that differs is refused where it would have trained or measured otherwise: the trainer and the
evaluation are started for every arm, and compare. For one that is done that takes about half a minute.

`--jobs 3` makes three runs at once on one GPU: while one loads, compiles or is measured, the others train. Each writes
to OUT/ARM/SEED/log.txt what it has to say.

An arm that differs in sampling alone is measured on the default's weights. "default" is what the stage's
miniworld_config.py and the settings behind `--` say.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from common.config.command_line import ArgumentParser, not_negative_number, refuse_unwritable, whole_number
from common.config.errors import UserError, run_cli
from common.config.files import replace_text

DEFAULT = "default"
CONTROL_GUIDANCE = "2"  # of every model that is not distilled


@dataclass(frozen=True)
class Arm:
    """One change: settings of the training run and options of the evaluation, as on their launch lines."""

    train: str = ""
    evaluate: str = ""


_LORA_LAYERS = (
    "--lora_target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 norm1.linear norm2.linear"  # of every block
)
_GUIDANCE = {
    "guidance on nothing": Arm(evaluate="--guidance_scale 1 --control_guidance_scale 1"),
    "guidance on text, 3": Arm(evaluate="--guidance_scale 3 --control_guidance_scale 1"),
    "guidance on control, 4": Arm(evaluate="--guidance_scale 1 --control_guidance_scale 4"),
    "guidance on both, 2": Arm(evaluate="--guidance_scale 2 --control_guidance_scale 2"),
}
ARMS: dict[int, dict[str, Arm]] = {
    2: {
        DEFAULT: Arm(),
        "one control token a frame": Arm("--control_tokens_per_frame 1"),
        "LoRA beside the adapter": Arm(f"--rank 32 --lora_alpha 32 {_LORA_LAYERS}"),
        "without positions": Arm("--control_temporal_position False"),
        "label of the last raw frame": Arm("--control_label last"),
        "token_causal": Arm("--control_attention token_causal --control_temporal_position False"),
        "muon": Arm("--optimizer muon"),
        **_GUIDANCE,
    },
    3: {
        DEFAULT: Arm(),
        "W=2 windows only": Arm("--window_frames 33"),
        "W=1 windows only": Arm("--window_frames 17"),
        # To be compared with "W=2 windows only": the condition is always the VAE's first latent, of one frame.
        "W=2 windows from first frames": Arm(
            "--frame_buckets 33 --window_frames --windows_per_clip 3 --latent_cache_dir {clip_cache}"
        ),
        "condition at t=20": Arm("--condition_timestep 20"),
        "condition at t=100": Arm("--condition_timestep 100"),
        "no uniform timesteps": Arm("--uniform_timestep_share 0"),
        "label of the last raw frame": Arm("--control_label last"),
        "half uniform timesteps": Arm("--uniform_timestep_share 0.5"),
        "offset noise .2": Arm("--offset_noise 0.2"),
        "offset noise .5": Arm("--offset_noise 0.5"),
        "muon": Arm("--optimizer muon"),
        "4 steps": Arm(evaluate="--num_inference_steps 4"),
        **_GUIDANCE,
    },
    4: {
        DEFAULT: Arm(),
        "EMA .8": Arm("--ema_decay 0.8"),
        "EMA .99": Arm("--ema_decay 0.99"),
        "EMA .999": Arm("--ema_decay 0.999"),
        "Huber .001": Arm("--huber_c 0.001"),
        "Huber .1": Arm("--huber_c 0.1"),
        "guidance embedded": Arm("--guidance_range 1 3 --cond_proj_dim 32"),
        "20 solver steps": Arm("--num_solver_steps 20"),
        "2 phases per group": Arm("--phases_per_group 2"),
        # The factors need a larger rate than whole matrices.
        "LoRA student": Arm(f"--rank 64 --lora_alpha 64 {_LORA_LAYERS} --learning_rate 1e-3"),
        "offset noise .2": Arm("--offset_noise 0.2"),
        "no key presses": Arm("--key_press_share 0"),
        "key presses in all": Arm("--key_press_share 1"),
        "teacher guided on control by 3": Arm("--teacher_control_guidance_scale 3"),
    },
}
MEASURES = {2: ("control", "frechet"), 3: ("control", "frechet", "latency"), 4: ("control", "frechet", "latency")}


def figures_of(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of the one model in an evaluation's report."""
    (row,) = (row for row in report["rows"] if row["kind"] == "model")
    (way,) = row["measures"]["control"]  # "clips" or "streams"
    figures = {
        "control F1": row["measures"]["control"][way]["macro_f1"][0],
        "Fréchet": row["measures"]["frechet"][way]["distance"][0],
    }
    for width, values in sorted(row["measures"].get("latency", {}).items()):
        figures[f"latency {width}"] = values["median"][0] if values["median"][0] is not None else float("nan")
        figures[f"live F1 {width}"] = values["live_f1"][0]
    for control, values in sorted(row["measures"].get("drift", {}).items()):
        figures[f"drift {control}"] = values["last_ratio"][0]  # Fréchet distance at the end ÷ that of minute 1
    return figures


def table_of(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown: an arm a line, each number as mean (lowest…highest) over the training seeds.

    A number is bold where its range and the default's do not meet: that many seeds tell the two apart.
    """
    names = list(dict.fromkeys(name for runs in results.values() for run in runs.values() for name in run))
    lines = ["| arm | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    reference = results.get(DEFAULT, {})
    for arm, runs in results.items():
        cells = []
        for name in names:
            values, others = ([run[name] for run in group.values() if name in run] for group in (runs, reference))
            if not values:
                cells.append("–")
                continue
            text = f"{statistics.fmean(values):.3f} ({min(values):.3f}…{max(values):.3f})"
            apart = others and len(values) > 1 and (min(values) > max(others) or max(values) < min(others))
            cells.append(f"**{text}**" if apart else text)
        lines.append(f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class Ablation:
    """Runs and measures arms; `run` calls a program, whose output goes into a file if one is named (replaced in
    tests)."""

    def __init__(self, args: argparse.Namespace, run: Callable[[Sequence[str], Path | None], None]):
        self.args, self.run = args, run
        self.trained: set[Path] = set()  # some arms have the default's weights: once is enough
        self.locks: dict[Any, Lock] = {}
        self.is_stopped = Event()

    def folder(self, arm: str, seed: int) -> Path:
        return self.args.output_dir / "".join(c if c.isalnum() else "_" for c in arm) / str(seed)

    def start(self, words: Sequence[str], log: Path | None) -> None:
        """Runs a program, unless another job has failed or the user wants an end: a trainer that is interrupted ends as
        if it were done."""
        if self.is_stopped.is_set():
            raise UserError(f"{words[0]} was not started")
        self.run(words, log)

    def one_at_a_time(self, what: Any) -> Lock:
        """The lock of what several jobs may want to make."""
        return self.locks.setdefault(what, Lock())

    def measure(self, arm: str, seed: int) -> dict[str, float]:
        """Trains and evaluates one arm at one seed. Both programs keep what they made before, and refuse to go on from
        what other settings made."""
        change, report = ARMS[self.args.stage][arm], self.folder(arm, seed) / "report"
        trained = self.folder(arm if change.train else DEFAULT, seed) / "model"
        log = self.folder(arm, seed) / "log.txt" if self.args.jobs > 1 else None
        with self.one_at_a_time(trained):
            if trained not in self.trained:
                self.start([
                    "common.tools.train", "--config", f"stage{self.args.stage}/training/miniworld_config.py",
                    "--pretrained_model_name_or_path", str(self.args.pretrained_model_name_or_path),
                    "--output_dir", str(trained), "--seed", str(seed), "--validation_steps", "0",
                    "--validation_prompts", *self.args.settings,
                    *(word.format(clip_cache=self.args.clip_cache) for word in change.train.split()),
                ], log)  # fmt: skip
                self.trained.add(trained)
        minutes = self.args.drift_minutes
        drift = ("drift", "--minutes", f"{minutes:g}", "--num_streams", "24") if minutes else ()
        guided = () if self.args.stage == 4 else ("--control_guidance_scale", CONTROL_GUIDANCE)
        evaluation = [
            "common.tools.evaluate", "--model_path", str(trained), "--output_dir", str(report),
            "--measures", *MEASURES[self.args.stage], *drift, "--num_videos", str(self.args.num_videos),
            "--batch_size", str(self.args.num_videos), "--seeds", str(seed), *guided, *change.evaluate.split(),
        ]  # fmt: skip
        with self.one_at_a_time(f"true video of seed {seed}"):
            is_there = self.share_true_video(report / "parts", seed)
            if not is_there:
                self.start(evaluation, log)
        if is_there:
            self.start(evaluation, log)
        return figures_of(json.loads((report / "report.json").read_text()))

    def share_true_video(self, parts: Path, seed: int) -> bool:
        """True video is drawn and measured for one arm at each seed; the others get what came of it (`evaluate`).

        False if there is none yet.
        """
        parts.mkdir(parents=True, exist_ok=True)
        made = [
            part
            for part in self.args.output_dir.glob(f"*/{seed}/report/parts/[!.]*.json")
            if not part.name.startswith("model.")
        ]
        for part in made:
            if not (parts / part.name).exists():
                shutil.copyfile(part, parts / part.name)
        return bool(made)

    def all(self) -> str:
        """The table of all arms; written anew after each result."""
        results: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in self.args.arms}
        jobs = ThreadPoolExecutor(self.args.jobs)
        try:
            # Seed by seed: every arm has one before any has two.
            runs = {jobs.submit(self.measure, arm, seed): (arm, seed) for seed in self.args.seeds for arm in results}
            for run in as_completed(runs):
                arm, seed = runs[run]
                results[arm][seed] = run.result()
                replace_text(self.args.output_dir / "ablation.json", json.dumps(results, indent=1) + "\n")
                replace_text(self.args.output_dir / "ablation.md", table_of(results))
        except BaseException:
            self.is_stopped.set()
            raise
        finally:
            jobs.shutdown(cancel_futures=True)  # what runs already goes on to its end
        return table_of(results)


def run_program(words: Sequence[str], log: Path | None) -> None:
    """Runs `python -m words…` to its end. UserError when it fails: it has said why."""
    if log is None:
        code = subprocess.run([sys.executable, "-m", *words], check=False).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            code = subprocess.run([sys.executable, "-m", *words], check=False, stdout=file, stderr=file).returncode
    if code:
        said = f", see {log}" if log else ""
        raise UserError(f"{words[0]} ended with {code}{said}; the same command goes on once that is mended")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = ArgumentParser(__doc__)
    parser.add_argument("--stage", type=int, choices=sorted(ARMS), required=True)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, required=True, help="what every arm starts from")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=None, help="some of the stage's arms; by default all")
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0, 1, 2], help="of the training runs")
    parser.add_argument("--clip_cache", type=Path, default=None, help="latents of three 33-frame windows a clip")
    parser.add_argument("--drift_minutes", type=not_negative_number, default=0, help="streams' length; 0: no drift")
    parser.add_argument("--num_videos", type=whole_number(1), default=96, help="measured of each run")
    parser.add_argument("--jobs", type=whole_number(1), default=1, help="runs at once")
    args = parser.parse_args(words[:cut])
    args.settings = words[cut + 1 :]
    if args.drift_minutes and (args.stage == 2 or args.drift_minutes < 0.17):
        raise UserError(f"--drift_minutes {args.drift_minutes:g}: give 0.17 or more, with --stage 3 or 4, which stream")
    known = ARMS[args.stage]
    args.arms = args.arms or list(known)
    for arm in args.arms:
        if arm not in known:
            raise UserError(f"--arms {arm!r}: stage {args.stage} has {', '.join(map(repr, known))}")
        if "{clip_cache}" in known[arm].train and args.clip_cache is None:
            raise UserError(f"--clip_cache: the arm {arm!r} needs it; leave that arm out by --arms, or give the cache")
    return args


def main() -> None:
    args = parse_arguments()
    refuse_unwritable(args.output_dir, "--output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(Ablation(args, run_program).all())


if __name__ == "__main__":
    run_cli(main)
