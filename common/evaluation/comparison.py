"""The report of an evaluation as data: all parts of a folder, row by row, summed up. It is what report.json holds.

    {"version": 1, "signals": […], "rows": [{"name", "kind", "settings", "vae", "speed", "measures"}, …]}

A row's "measures" has, as far as parts of them exist: "control", "frechet" and "text", each {variant: summary} with
variant "clips" or "streams"; "latency" {"w2": …, "live" for true video: …}; "drift" {"mixed": …, "straight": …}.
Numbers with an interval are [value, low, high]. The summaries are those of common.evaluation.summary; each also has
"seeds" and "scenes".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.config.errors import UserError
from common.evaluation.parts import Part, without_nan
from common.evaluation.summary import (
    control_summary,
    drift_summary,
    frechet_summary,
    latency_summary,
    text_summary,
    values_of,
)

KINDS = ("true", "vae", "model")  # in the report's order
SCENE_SETTINGS = ("held_out_seed", "num_videos", "num_frames", "height", "width", "reference_drives")


class _Parts:
    """The parts by what they are of, one for each seed."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts

    def of(self, row: str, measure: str, variant: str) -> dict[int, Part]:
        return {
            part.key.seed: part
            for part in self.parts
            if (part.key.row, part.key.measure, part.key.variant) == (row, measure, variant)
        }

    def beside(self, parts: dict[int, Part], row: str, measure: str, variant: str) -> list[Part] | None:
        """Another row's parts of the same seeds and the same scenes; None unless all are there."""
        others = self.of(row, measure, variant)
        found = [others[seed] for seed in parts if seed in others and _same_scenes(parts[seed], others[seed])]
        return found if len(found) == len(parts) else None


def _same_scenes(one: Part, other: Part) -> bool:
    names = ("held_out_seed", "num_videos", "height", "width")
    same_length = one.key.measure == "drift" or one.settings["num_frames"] == other.settings["num_frames"]
    return same_length and all(one.settings[name] == other.settings[name] for name in names)


def make_report(parts: Sequence[Part], signals: Sequence[str], first: Sequence[str] = ()) -> dict[str, Any]:
    """Rows are true video, VAEs, then models: those named in `first`, and the others by name."""
    found = _Parts(parts)
    kinds = {part.key.row: part.kind for part in parts if part.kind in KINDS}
    order = {name: place for place, name in enumerate(first)}
    names = sorted(kinds, key=lambda name: (KINDS.index(kinds[name]), order.get(name, len(order)), name))
    rows = [_row(found, name, kinds[name], len(signals)) for name in names]
    return without_nan({"version": 1, "signals": list(signals), "rows": rows})


def _row(found: _Parts, name: str, kind: str, num_signals: int) -> dict[str, Any]:
    mine = [part for part in found.parts if part.key.row == name]
    _check_alike(mine)
    measures: dict[str, dict[str, Any]] = {}
    for measure, variant in sorted({(part.key.measure, part.key.variant) for part in mine}):
        parts = found.of(name, measure, variant)
        summary = _summary(found, parts, num_signals)
        if summary is not None:
            about = {"seeds": list(parts), "scenes": {n: v for n, v in _settings(parts).items() if n in SCENE_SETTINGS}}
            measures.setdefault(measure, {})[variant] = summary | about
    settings = {n: v for n, v in mine[0].settings.items() if n not in SCENE_SETTINGS}
    # The fastest seed was disturbed least.
    timed = [part.about for part in mine if "seconds_per_frame" in part.about]
    timed = [about for about in timed if about["forwards_per_frames"] == timed[0]["forwards_per_frames"]]
    speed = min(timed, key=lambda about: about["seconds_per_frame"], default=None)
    vae = settings.get("vae") or (settings.get("weights") if kind == "vae" else None)
    return {"name": name, "kind": kind, "settings": settings, "vae": vae, "speed": speed, "measures": measures}


def _check_alike(parts: Sequence[Part]) -> None:
    """UserError unless all of a row are of one model, sampled alike, and each measure's seeds of scenes alike too."""
    firsts: dict[Any, Part] = {}
    for part in parts:
        way = part.key.measure, part.key.variant
        for name, value in part.settings.items():
            is_of_way = name in SCENE_SETTINGS or name == "frames_per_group"
            first = firsts.setdefault((name, way if is_of_way else None), part)
            if first.settings[name] != value:
                raise UserError(
                    f"{first.key.file_name} was made with {name} {first.settings[name]}, {part.key.file_name} with "
                    f"{value}: one row cannot hold both; delete one, or measure it by another --name"
                )


def _settings(parts: dict[int, Part]) -> dict[str, Any]:
    return next(iter(parts.values())).settings


def _summary(found: _Parts, parts: dict[int, Part], num_signals: int) -> dict[str, Any] | None:
    """One row's numbers in one measure and variant; None where what they need is not there."""
    some = next(iter(parts.values()))
    key, values = some.key, values_of(list(parts.values()))

    def others(row: str) -> list | None:
        beside = found.beside(parts, row, key.measure, key.variant)
        return None if beside is None else values_of(beside)

    if key.measure == "control":
        ceiling = others(f"vae-{some.settings['vae']}") if some.kind == "model" else None
        return control_summary(values, num_signals, ceiling)
    if key.measure == "frechet":
        reference = others("reference")
        return None if reference is None else frechet_summary(values, reference, others("true"))
    if key.measure == "text":
        return text_summary(values)
    if key.measure == "latency":
        return latency_summary(values, num_signals)
    return drift_summary(values, others("true")) if all(part["segments"] for part in values) else None
