r"""Measures what models of the mini world do, and writes a report that sets them side by side.

    python -m common.tools.evaluate --output_dir outputs/report --model_path outputs/miniworld/stage2 \
        outputs/miniworld/stage3 --name "stage 2" "stage 3"

Takes any stage's directory: base models and fused stage 1 (clips, no control), stage 2 (clips), stages 3 and 4
(streams).
Measured are, on held-out captions and drives, at each of several sampling seeds:

    control    which signal each latent frame obeys: macro-F1, confusion matrix, trajectory error
    frechet    Fréchet distance of 16-frame segments from true video of the same captions
    text       do biome, weather and colour named in the caption appear
    latency    streams: frames from a key press to its visible answer, when the newest command is asked for live, and
               control beside the same commands known ahead; at the model's W and at --frames_per_group
    drift      streams: distance and look of every ten seconds, on mixed controls and on straight-only

The same is measured of true video, and, as the ceiling, of true video that went through each model's VAE. OUT holds
report.md, report.json, the plots, videos/ of two scenes and their contact sheets, and parts/: a small file for each
result, written as it is finished. An interrupted evaluation, started again, goes on from them. To share the work among
machines, give each other --seeds, --measures or models, copy all parts into one folder, and start the program once more
with that folder and without --model_path.

A rerun gives the same numbers on the same kind of machine: noise is drawn on the CPU, from sampling seed and number.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from common.cogvideox.loading import COUNT, add_place_options
from common.config.command_line import ArgumentParser, positive_number, refuse_unwritable, whole_number
from common.config.errors import UserError, run_cli
from common.evaluation.comparison import make_report
from common.evaluation.parts import MEASURES, PartStore
from common.evaluation.report import write_report
from common.tools.evaluate_models import ModelPlan, plan_model
from common.tools.evaluate_run import REFERENCE_ROW, TRUE_ROW, Evaluation
from common.tools.evaluate_samples import draw_samples
from common.tools.inference import OUT_OF_MEMORY_HELP
from data.miniworld.simulator import SIGNALS

SEGMENT_FRAMES = 16  # that the scene network reads at once


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add, number = parser.add_argument, whole_number(0)
    add("--model_path", nargs="*", default=[], help="pipeline directories of any stage; none: only write the report")
    add("--output_dir", type=Path, required=True, help="folder of the report, its plots and parts/")
    add("--name", nargs="*", help="labels of the models in the report; by default the directories' names")
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure; by default all")
    add("--seeds", nargs="+", type=number, default=[0, 1, 2], help="sampling seeds; each has scenes of its own")
    add("--held_out_seed", type=number, default=0, help="draws captions, drives and starts; another makes another test")
    add("--num_videos", type=whole_number(2), default=16, help="videos for each seed")
    frames = whole_number(SEGMENT_FRAMES + 1, step=4)
    add("--num_frames", type=frames, default=33, help="raw frames of a clip, 4n + 1, of models that do not stream")
    add("--stream_seconds", type=positive_number, default=10.0, help="length that counts of streams, but for drift")
    add("--minutes", type=positive_number, default=1.0, help="length of the streams for drift")
    add("--num_streams", type=whole_number(2), default=8, help="streams side by side for drift, for each seed")
    add("--reference_drives", type=COUNT, default=3, help="true drives a caption that Fréchet distances are from")
    add("--num_inference_steps", type=COUNT, help="denoising steps; default about 20. Distilled models keep their own")
    add("--guidance_scale", type=float, default=1.0, help="guidance on text; 1 for none")
    add("--control_guidance_scale", type=float, default=3.0, help="guidance on control; distilled models have none")
    add("--frames_per_group", nargs="+", type=COUNT, help="further W at which to measure latency")
    add("--batch_size", type=COUNT, default=8, help="videos side by side; the numbers do not depend on it")
    add_place_options(parser)
    return parser.parse_args()


def row_names(args: argparse.Namespace) -> list[str]:
    """The models' labels, checked: they are parts of file names, and no two are alike."""
    names = args.name
    if names is None:  # CogVideoX1.5-5B: its directory's name, as far as it can be part of a file's
        names = [re.sub(r"[^\w+=-]+", "-", Path(path).absolute().name) for path in args.model_path]
    if len(names) != len(args.model_path):
        raise UserError(f"--name has {len(names)} labels for {len(args.model_path)} models; give one each")
    for name in names:
        if not re.fullmatch(r"[\w+=-][\w +=,-]*", name):
            raise UserError(f"--name {name!r}: use letters, digits, spaces and + = , - _ only")
        if name in (TRUE_ROW, REFERENCE_ROW) or name.startswith("vae-"):
            raise UserError(f"--name {name}: that is what the report calls its own rows; choose another")
    if len(set(names)) < len(names):
        raise UserError(f"two models are called {max(names, key=names.count)}; tell them apart with --name")
    return names


def check(args: argparse.Namespace) -> list[ModelPlan]:
    """What will be done; what is impossible is refused before anything is loaded or made."""
    refuse_unwritable(args.output_dir, "--output_dir")
    names = row_names(args)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: a seed occurs twice")
    if args.stream_seconds < 3:
        raise UserError(f"--stream_seconds {args.stream_seconds:g}: give 3 or more, to see an answer to a command")
    if "drift" in args.measures and 60 * args.minutes < 10:
        raise UserError(f"--minutes {args.minutes:g}: drift is measured by segments of 10 s; give 0.17 or more")
    return [plan_model(path, name, args) for path, name in zip(args.model_path, names, strict=True)]


def main() -> None:
    args = parse_arguments()
    plans = check(args)
    store = PartStore(args.output_dir / "parts")
    evaluation = Evaluation(args, store)
    for plan in plans:
        evaluation.measure(plan)
    parts = store.all()
    if not parts:
        raise UserError(f"{store.folder} holds no results, and no --model_path says what to measure")
    report = make_report(parts, SIGNALS, [plan.name for plan in plans])
    rows = [row["name"] for row in report["rows"]]
    print(write_report(args.output_dir, report, draw_samples(args.output_dir / "videos", rows, args.output_dir)))
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
