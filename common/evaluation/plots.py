"""The plots of an evaluation's report, PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: it takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3266ad", "#c8553d", "#3a8f5c", "#8a5aa8", "#b8860b", "#2a9d9d", "#a8456b", "#5c6670")
QUIET = "#8d949c"
SEGMENT = 10 / 60  # minutes
LOOKS = ("saturation", "contrast", "sharpness")
Named = tuple[str, dict[str, Any]]


def write_plots(folder: Path, report: dict[str, Any]) -> dict[str, list[str]]:
    """Writes a file for each thing that was measured; returns section → file names."""
    from matplotlib import use

    use("Agg")  # draws into files, without a window
    written: dict[str, list[str]] = {}
    for section, name, figure in _figures(report):
        figure.savefig(folder / name, dpi=120, metadata={"Software": None})
        written.setdefault(section, []).append(name)
    return written


def _figures(report: dict[str, Any]):
    """(section, file name, figure) of all that there is to draw."""
    control, distance = _of(report, "control"), _of(report, "frechet")
    if control:
        yield "control", "control.png", bars(control, "macro_f1", "control macro-F1", (0, 1))
        yield "control", "confusion.png", confusion(control, report["signals"])
    if distance:
        yield "frechet", "frechet.png", bars(distance, "distance", "Fréchet distance", None, "floor")
    if latency := [entry for entry in _of(report, "latency") if entry[1]["frames"]]:
        yield "latency", "latency.png", latencies(latency)
    for controls in ("mixed", "straight"):
        runs = _of(report, "drift", controls)
        if any(summary["floor"] is not None for _, summary in runs) or len(runs) > 1:
            yield "drift", f"drift_{controls}.png", drift(runs, controls)


def _of(report: dict[str, Any], measure: str, only: str | None = None) -> list[Named]:
    """(label, summary) of the rows with a measure; the variant is named where a row has several."""
    found = []
    for row in report["rows"]:
        variants = {v: s for v, s in row["measures"].get(measure, {}).items() if only in (None, v)}
        name = {"true": "true video", "vae": "VAE ceiling"}.get(row["kind"], row["name"])
        found += [(name if len(variants) == 1 else f"{name}, {v}", s) for v, s in variants.items()]
    return found


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    pyplot.close(figure)  # pyplot forgets it; the figure itself can still be saved
    return figure, axes


def bars(
    named: list[Named], value: str, title: str, limits: tuple[float, float] | None, mark: str | None = None
) -> Figure:
    """A bar with its interval for each row; `mark` names a number that is drawn as a line across the bar."""
    figure, ((axes,),) = _figure(max(4.0, 1.1 * len(named) + 1.5), 3.6)
    for place, (_, summary) in enumerate(named):
        middle, low, high = summary[value]
        error = [[max(middle - low, 0)], [max(high - middle, 0)]]
        axes.bar(place, middle, 0.6, color=COLORS[place % len(COLORS)])
        axes.errorbar(place, middle, error, color="#22272b", capsize=4, linewidth=1.2)
        if mark and summary.get(mark) is not None:
            axes.plot([place - 0.36, place + 0.36], [summary[mark]] * 2, color=QUIET, linestyle="--", label=mark)
    axes.set_xticks(range(len(named)), [name.replace(", ", ",\n") for name, _ in named], rotation=20, ha="right")
    axes.set_ylabel(title)
    if limits:
        axes.set_ylim(*limits)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles[:1], [f"{labels[0]}: true video of the same drives"], frameon=False)
    _plain(axes)
    return figure


def confusion(named: list[Named], signals: list[str]) -> Figure:
    """Confusion matrices side by side, each row as shares of the given signal."""
    import numpy as np

    columns = min(len(named), 4)
    rows = -(-len(named) // columns)
    figure, grid = _figure(2.9 * columns + 0.4, 3.1 * rows, rows, columns)
    for axes, entry in zip(grid.flat, [*named, *[None] * (grid.size - len(named))], strict=True):
        if entry is None:
            axes.set_axis_off()
            continue
        counts = np.array(entry[1]["confusion"], dtype=float)
        image = axes.imshow(counts / counts.sum(1, keepdims=True).clip(min=1), vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(signals)), signals, fontsize=7)
        is_first = axes in grid[:, 0]
        axes.set_yticks(range(len(signals)), signals if is_first else [], fontsize=7)
        axes.set_title(f"{entry[0]}\nF1 {entry[1]['macro_f1'][0]:.3f}", fontsize=9)
        axes.set_xlabel("obeyed", fontsize=8)
        if is_first:
            axes.set_ylabel("given", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.7, label="share of the given signal's frames")
    return figure


def latencies(named: list[Named]) -> Figure:
    """For each row the share of all changes answered after so many frames; below 1 where some never are."""
    figure, ((axes,),) = _figure(6.0, 3.6)
    for place, (name, summary) in enumerate(named):
        frames = summary["frames"]
        shares = [(i + 1) / summary["num_changes"] for i in range(len(frames))]
        axes.step([0, *frames], [0, *shares], where="post", color=COLORS[place % len(COLORS)], label=name)
    axes.axvline(8, color=QUIET, linestyle="--", linewidth=1)
    axes.set_xlabel("frames since the key was pressed (1/16 s)")
    axes.set_ylabel("changes answered")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def drift(named: list[Named], controls: str) -> Figure:
    """Distance of every segment over time, and the look's statistics as shares of those of true video."""
    figure, grid = _figure(7.5, 6.8, 1 + len(LOOKS), 1)
    true = next((summary for name, summary in named if name.startswith("true video")), None)
    models = [(name, summary) for name, summary in named if summary is not true]
    top = grid[0][0]
    for place, (name, summary) in enumerate(models):
        minutes = [start / 60 + SEGMENT / 2 for start in summary["start"]]
        style = {"color": COLORS[place % len(COLORS)], "marker": "." if len(minutes) < 30 else None}
        top.plot(minutes, summary["distance"], label=name, **style)
        for axes, look in zip(grid[1:, 0], LOOKS, strict=True):
            base = sum(true["look"][look]) / len(true["look"][look]) if true else summary["look"][look][0]
            axes.plot(minutes, [value / base for value in summary["look"][look]], **style)
    if true:
        floor = sum(true["distance"]) / len(true["distance"])
        top.axhline(floor, color=QUIET, linestyle="--", label="true video")
    top.set_ylabel("Fréchet distance")
    top.set_title("straight-only driving" if controls == "straight" else "mixed controls", fontsize=10)
    top.set_ylim(bottom=0)
    if models or true:
        top.legend(frameon=False, fontsize=8)
    for axes, look in zip(grid[1:, 0], LOOKS, strict=True):
        axes.axhline(1, color=QUIET, linestyle="--", linewidth=1)
        axes.set_ylabel(f"{look}\n÷ true")
    grid[-1][0].set_xlabel("minutes")
    for axes in grid[:, 0]:
        axes.set_xlim(left=0)
        _plain(axes)
    return figure
