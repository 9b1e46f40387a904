"""report.json, report.md and the plots of an evaluation, from what `common.evaluation.comparison.make_report` says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common.config.files import replace_text
from common.evaluation.plots import write_plots

Row = dict[str, Any]
KIND_NAMES = {"true": "true video", "vae": "VAE ceiling"}


def write_report(folder: Path, report: dict[str, Any], samples: Sequence[str] = ()) -> str:
    """Writes report.json, report.md and PNG files into `folder`; returns the summary table as text.

    `samples` are PNG files there that show videos.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    plots = write_plots(folder, report)
    replace_text(folder / "report.md", markdown(report, plots, samples))
    return summary_table(report)


def label(row: Row, report: dict[str, Any]) -> str:
    """What a row is called in tables and plots."""
    if row["kind"] == "vae":
        several = sum(other["kind"] == "vae" for other in report["rows"]) > 1
        return f"VAE ceiling {row['vae']}" if several else "VAE ceiling"
    return KIND_NAMES.get(row["kind"], row["name"])


# ---- numbers as text -------------------------------------------------------------------------------------------------


def plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(value: Sequence[float] | None, digits: int = 3) -> str:
    """[value, low, high] → "0.912 (0.88–0.94)"."""
    if value is None or value[0] is None:
        return "–"
    fewer = max(digits - 1, 0)
    return f"{value[0]:.{digits}f} ({value[1]:.{fewer}f}…{value[2]:.{fewer}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for who reads it as text."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
             for line in lines]  # fmt: skip
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def entries(report: dict[str, Any], measure: str) -> list[tuple[Row, str, dict[str, Any]]]:
    """(row, variant, summary) of everything that was measured in this way."""
    return [(row, variant, summary) for row in report["rows"]
            for variant, summary in row["measures"].get(measure, {}).items()]  # fmt: skip


# ---- the tables ------------------------------------------------------------------------------------------------------


def summary_table(report: dict[str, Any]) -> str:
    """One line for each row and kind of video."""
    head = ("", "video", "control F1", "of the ceiling", "Fréchet", "floor", "text",
            "latency 50 / 95 %", "forwards", "s / frame")  # fmt: skip
    lines = []
    for row in report["rows"]:
        measures = row["measures"]
        variants = sorted({v for m in ("control", "frechet", "text") for v in measures.get(m, {})})
        for variant in variants or ["streams"]:
            control, distance, text = (measures.get(m, {}).get(variant, {}) for m in ("control", "frechet", "text"))
            lines.append((
                label(row, report), variant, with_interval(control.get("macro_f1")),
                with_interval(control.get("share_of_ceiling")), with_interval(distance.get("distance"), 2),
                plain(distance.get("floor"), 2), with_interval(text.get("all")), *_speed_cells(row, variant),
            ))  # fmt: skip
    return table(head, lines)


def _speed_cells(row: Row, variant: str) -> tuple[str, str, str]:
    """Latency at the model's own W, forwards, and seconds a frame."""
    speed, latencies = row["speed"], row["measures"].get("latency", {}) if variant == "streams" else {}
    own = f"w{speed['forwards_per_frames'] // 4}" if speed else "live"
    latency = "–"
    if latencies:
        summary = latencies.get(own) or next(iter(latencies.values()))
        latency = f"{plain(summary['median'][0], 1)} / {plain(summary['percentile_95'], 1)}"
    if not speed:
        return latency, "–", "–"
    forwards = f"{speed['forwards']:g} / {speed['forwards_per_frames']} frames"
    return latency, forwards, f"{speed['seconds_per_frame']:.3g}"


def control_table(report: dict[str, Any]) -> str:
    head = ("", "video", "macro-F1", "each seed", "of the ceiling", "wrong after a change", "elsewhere",
            "position ATE", "heading ATE", "videos")  # fmt: skip
    return table(head, (
        (label(row, report), variant, with_interval(s["macro_f1"]), " ".join(plain(f) for f in s["macro_f1_of_seeds"]),
         with_interval(s.get("share_of_ceiling")), plain(s["wrong"]["after_change"]), plain(s["wrong"]["elsewhere"]),
         with_interval(s["position_share"]), with_interval(s["heading_share"]), str(s["num_videos"]))
        for row, variant, s in entries(report, "control")
    ))  # fmt: skip


def frechet_table(report: dict[str, Any]) -> str:
    head = ("", "video", "distance", "floor", "above the floor", "segments", "reference segments")
    return table(head, (
        (label(row, report), variant, with_interval(s["distance"], 2), plain(s.get("floor"), 2),
         plain(s["distance"][0] - s["floor"], 2) if "floor" in s else "–",
         str(s["num_samples"]), str(s["num_reference_samples"]))
        for row, variant, s in entries(report, "frechet")
    ))  # fmt: skip


def text_table(report: dict[str, Any]) -> str:
    measured = entries(report, "text")
    kinds = list(dict.fromkeys(
        kind for _, _, s in measured for kind in s if kind not in ("all", "num_videos", "seeds", "scenes")
    ))  # fmt: skip
    return table(("", "video", *kinds, "all", "videos"), (
        (label(row, report), variant, *(with_interval(s.get(kind)) for kind in [*kinds, "all"]), str(s["num_videos"]))
        for row, variant, s in measured
    ))  # fmt: skip


def latency_table(report: dict[str, Any]) -> str:
    head = ("", "W", "median", "95 %", "unanswered", "changes", "F1 live", "F1 known ahead", "difference")
    return table(head, (
        (label(row, report), variant.removeprefix("w"), with_interval(s["median"], 1), plain(s["percentile_95"], 1),
         str(s["num_unanswered"]), str(s["num_changes"]), with_interval(s.get("live_f1")),
         with_interval(s.get("ahead_f1")), with_interval(s.get("live_minus_ahead")))
        for row, variant, s in entries(report, "latency")
    ))  # fmt: skip


def drift_table(report: dict[str, Any]) -> str:
    head = ("", "controls", "first", "last", "floor", "worst / minute 1", "last / minute 1",
            "minute 10 / 1", "minute 60 / 1", "worst above floor", "farthest look")  # fmt: skip
    lines = []
    for row, variant, s in entries(report, "drift"):
        name = max(s["worst_look"], key=lambda n: abs(s["worst_look"][n] - 1)) if row["kind"] == "model" else None
        lines.append((
            label(row, report), variant, plain(s["distance"][0], 2), plain(s["distance"][-1], 2), plain(s["floor"], 2),
            *(with_interval(s.get(key), 2) for key in
              ("worst_ratio", "last_ratio", "minute_10_ratio", "minute_60_ratio")),
            with_interval(s["above_floor"]["worst_ratio"], 2),
            f"{name} × {s['worst_look'][name]:.2f}" if name else "–",
        ))  # fmt: skip
    return table(head, lines)


SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "control": (
        "Control",
        "Which of the nine signals each latent frame obeys, read from the pixels. The ceiling is the same instrument "
        "on true video of the same drives after the model's VAE. ATE: absolute trajectory error against the true "
        "physics under the same signals, as a share of the distance driven and of the turns; medians over videos.",
        control_table,
    ),
    "frechet": (
        "Fréchet distance",
        "Of 16-frame segments from true video of the same captions, in other drives with other landmarks. The floor is "
        "what true video of the measured drives, equally many samples, shows.",
        frechet_table,
    ),
    "text": ("Text", "Share of the videos that show what the caption names.", text_table),
    "latency": (
        "Latency",
        "Frames (1/16 s) from a key press to the first visible, significant change of motion; presses come at any "
        "frame, and the model asks for the newest command once a shift. F1 live is measured against the commands that "
        "were delivered, and beside it F1 when the same ones are known ahead. True video answers at once: its row is "
        "what the instrument and the car's inertia need.",
        latency_table,
    ),
    "drift": (
        "Drift",
        "Fréchet distance of every ten seconds, all streams together, from true video of the same captions and "
        "the same kind of controls; ratios are to the mean of the first minute, over seeds "
        "(lowest…highest); above the floor: after true video's own distance was taken from both.",
        drift_table,
    ),
}  # fmt: skip


def markdown(report: dict[str, Any], plots: dict[str, list[str]], samples: Sequence[str]) -> str:
    """The report to read. `plots`: section → file names of its plots; `samples`: those of pictures of videos."""
    blocks = [
        "# What the models do", _scenes(report), summary_table(report),
        "In parentheses are 95 % intervals, by bootstrap over whole videos of all sampling seeds.",
    ]  # fmt: skip
    for section, (title, about, make) in SECTIONS.items():
        if entries(report, section):
            blocks += [f"## {title}", about, make(report), *(f"![{title}]({name})" for name in plots.get(section, []))]
    if samples:
        about = "The first scenes, true and as each model makes them; over each frame the signal commanded."
        blocks += ["## Samples", about, *(f"![Samples]({name})" for name in samples)]
    blocks += ["## How it was made", _settings(report)]
    return "\n\n".join(blocks) + "\n"


def _scenes(report: dict[str, Any]) -> str:
    """Which scenes were measured, in a sentence for each kind of video."""
    seen = {}
    for measure in ("control", "frechet", "text", "latency", "drift"):
        for row, variant, s in entries(report, measure):
            if row["kind"] == "model":
                scenes = s["scenes"]
                what = f"{measure} ({variant})" if measure in ("latency", "drift") else variant
                seen[what] = (
                    f"{what}: {scenes['num_videos']} videos of {scenes['num_frames']} frames, "
                    f"{scenes['height']} × {scenes['width']}, at seeds {', '.join(map(str, s['seeds']))}, "
                    f"held-out set {scenes['held_out_seed']}"
                )
    return "\n".join(f"- {line}" for line in seen.values()) or "Only true video has been measured so far."


def _settings(report: dict[str, Any]) -> str:
    names = ("num_inference_steps", "guidance_scale", "control_guidance_scale", "dtype", "weights", "vae")
    head = ("", "steps", "text guidance", "control guidance", "type", "weights", "VAE", "machine")
    return table(head, (
        (label(row, report), *(str(row["settings"].get(name) or "own") for name in names), _machine(row))
        for row in report["rows"] if row["kind"] == "model"
    ))  # fmt: skip


def _machine(row: Row) -> str:
    speed = row["speed"]
    if not speed:
        return "–"
    return f"{speed['machine']}, {speed['threads']} threads, {speed['batch_size']} at once, torch {speed['torch']}"
