"""From the parts of an evaluation to the numbers of its report: means, ratios and 95 % intervals over whole videos.

Every function takes the parts of one row, measure and variant, one for each sampling seed, and puts their videos
together; seeds have scenes of their own, so videos are independent draws. What is compared (with the ceiling, with a
schedule known ahead) is paired: the same videos are drawn for both.

Shapes: V videos of all seeds, F latent frames, K segments, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.evaluation.control_accuracy import confusion_matrix, macro_f1
from common.evaluation.drift import LOOK_NAMES, Look, Segment, distance_from_one, summarize
from common.evaluation.frechet import FeatureStatistics, Interval, bootstrap_interval, statistics_distance
from common.evaluation.parts import Part

Values = dict[str, Any]


def interval_json(interval: Interval) -> list[float]:
    """[value, low, high]."""
    return [interval.value, interval.low, interval.high]


def over_videos(
    statistic: Callable[[Tensor], float], num_videos: int, lowest: float = 0.0, highest: float = math.inf
) -> list[float]:
    """A statistic of video numbers int64 [n] with its interval, cut off where the statistic cannot be."""
    value, low, high = interval_json(bootstrap_interval(statistic, num_videos))
    return [value, max(low, lowest), min(high, highest)]


def share_of_videos(statistic: Callable[[Tensor], float], num_videos: int) -> list[float]:
    """`over_videos` of something between 0 and 1."""
    return over_videos(statistic, num_videos, 0.0, 1.0)


def _quantile(values: Tensor, share: float) -> float:
    return float(values.quantile(share)) if len(values) else math.nan


# ---- control ---------------------------------------------------------------------------------------------------------


def signals_of(values: Sequence[Values]) -> tuple[Tensor, Tensor]:
    """(given, obeyed) signals int64 [V, F − 1] of control values."""
    return tuple(torch.tensor([row for part in values for row in part[name]]) for name in ("true", "obeyed"))


def control_summary(values: Sequence[Values], num_signals: int, ceiling: Sequence[Values] | None = None) -> Values:
    """`ceiling`: the same scenes' values, of true video through the VAE."""
    true, obeyed = signals_of(values)

    def f1(rows: Tensor) -> float:
        return macro_f1(true[rows], obeyed[rows], num_signals)

    summary = {
        "macro_f1": share_of_videos(f1, len(true)),
        "macro_f1_of_seeds": [macro_f1(*signals_of([part]), num_signals) for part in values],
        "confusion": confusion_matrix(true, obeyed, num_signals).tolist(),
        "num_videos": len(true),
        "num_latent_frames": true.numel(),
        "wrong": _wrong_by_place(true, obeyed),
    }
    for name in ("position_share", "heading_share"):
        shares = torch.tensor([share for part in values for share in part[name]], dtype=torch.float64)
        summary[name] = over_videos(lambda rows, shares=shares: _quantile(shares[rows], 0.5), len(shares))
    if ceiling is not None:
        best_true, best = signals_of(ceiling)
        if not torch.equal(best_true, true):
            raise ValueError("the ceiling was measured on other scenes")
        ratio = over_videos(lambda rows: f1(rows) / max(macro_f1(true[rows], best[rows], num_signals), 1e-9), len(true))
        summary |= {"ceiling": macro_f1(true, best, num_signals), "share_of_ceiling": ratio}
    return summary


def _wrong_by_place(true: Tensor, obeyed: Tensor) -> dict[str, float | None]:
    """Share of latent frames that read as another signal: the first ones after a change of signal, and all others.

    Many wrong ones among the first alone mean answers that come late, not signals that are not understood.
    """
    is_first = torch.zeros_like(true, dtype=torch.bool)
    is_first[:, 1:] = true[:, 1:] != true[:, :-1]
    wrong = (true != obeyed).double()
    shares = {"after_change": wrong[is_first], "elsewhere": wrong[~is_first]}
    return {place: float(share.mean()) if len(share) else None for place, share in shares.items()}


# ---- Fréchet distance ------------------------------------------------------------------------------------------------


def features_of(values: Sequence[Values]) -> Tensor:
    """float64 [V, K, D]."""
    return torch.tensor([video for part in values for video in part["features"]], dtype=torch.float64)


def frechet_summary(values: Sequence[Values], reference: Sequence[Values], floor: Sequence[Values] | None) -> Values:
    """Distance from the reference's features; `floor` is true video of the row's own scenes, as many samples as it.

    The reference holds some drives of each video's caption. The interval draws a video and its caption's drives
    together: a set of fewer captions is compared with a reference of the same ones.
    """
    features, against = features_of(values), features_of(reference)
    against = against.unflatten(0, (len(features), -1))  # [V, drives, K, D]

    def distance(of: Tensor, rows: Tensor) -> float:
        sets = of[rows].flatten(0, 1), against[rows].flatten(0, 2)
        return statistics_distance(*map(FeatureStatistics.of, sets))

    everyone = torch.arange(len(features))
    summary = {
        "distance": over_videos(lambda rows: distance(features, rows), len(features)),
        "num_samples": features.shape[0] * features.shape[1],
        "num_reference_samples": against[..., 0].numel(),
    }
    return summary | ({} if floor is None else {"floor": distance(features_of(floor), everyone)})


# ---- text ------------------------------------------------------------------------------------------------------------


def text_summary(values: Sequence[Values]) -> Values:
    """Share of the videos that show what their caption names, by kind, and the mean over kinds as "all"."""
    kinds = list(values[0]["correct"])
    verdicts = [[math.nan if v is None else v for part in values for v in part["correct"][kind]] for kind in kinds]
    table = torch.tensor(verdicts, dtype=torch.float64)  # [kinds, V]
    summary = {
        kind: share_of_videos(lambda rows, row=row: float(row[rows].nanmean()), len(row))
        for kind, row in zip(kinds, table, strict=True)
    }
    every = share_of_videos(lambda rows: float(table[:, rows].nanmean(dim=1).nanmean()), table.shape[1])
    return {**summary, "all": every, "num_videos": table.shape[1]}


# ---- latency ---------------------------------------------------------------------------------------------------------


def latency_summary(values: Sequence[Values], num_signals: int) -> Values:
    """Median and 95 % over the answered changes, the number of the others, and what live control costs in F1."""
    frames = torch.tensor(
        [math.nan if f is None else f for part in values for f in part["frames"]], dtype=torch.float64
    )
    answered = frames[frames.isfinite()]

    def median(rows: Tensor) -> float:
        return _quantile(answered[rows], 0.5)

    summary = {
        "median": over_videos(median, len(answered)) if len(answered) else [None, None, None],
        "percentile_95": _quantile(answered, 0.95),
        "num_changes": len(frames),
        "num_unanswered": len(frames) - len(answered),
        "frames": sorted(answered.tolist()),
    }
    if "live" not in values[0]:
        return summary
    live, ahead = ([part[way] for part in values] for way in ("live", "ahead"))
    true, now = signals_of(live)
    _, known = signals_of(ahead)

    def gain(rows: Tensor) -> float:
        return macro_f1(true[rows], now[rows], num_signals) - macro_f1(true[rows], known[rows], num_signals)

    for name, obeyed in (("live_f1", now), ("ahead_f1", known)):
        summary[name] = share_of_videos(lambda rows, o=obeyed: macro_f1(true[rows], o[rows], num_signals), len(true))
    return summary | {"live_minus_ahead": over_videos(gain, len(true), -1.0, 1.0)}


# ---- drift -----------------------------------------------------------------------------------------------------------


def segments_of(values: Values) -> list[Segment]:
    return [Segment(s["start"], Look(**s["look"]), s["distance"], s["num_samples"]) for s in values["segments"]]


def drift_summary(values: Sequence[Values], floor: Sequence[Values] | None) -> Values:
    """Distance and look of every segment, and ratios to the first minute; means over sampling seeds, and their range.

    `floor`: true video of the same captions and controls, whose mean distance the `above_floor` ratios leave out.
    """
    runs = [segments_of(part) for part in values]
    length = min(len(run) for run in runs)
    if not length:
        raise ValueError("no segment of ten seconds is complete")
    runs = [run[:length] for run in runs]
    least = 0.0
    if floor:
        distances = [segment.distance for part in floor for segment in segments_of(part)]
        least = sum(distances) / max(len(distances), 1)

    def of_seeds(number: Callable[[Any], float], summaries: list) -> list[float]:
        each = [number(one) for one in summaries]
        return [sum(each) / len(each), min(each), max(each)]

    plain, above = [summarize(run) for run in runs], [summarize(run, floor=least) for run in runs]
    summary: Values = {
        "start": [segment.start for segment in runs[0]],
        "distance": [sum(run[i].distance for run in runs) / len(runs) for i in range(length)],
        "distance_of_seeds": [[segment.distance for segment in run] for run in runs],
        "look": {n: [sum(getattr(run[i].look, n) for run in runs) / len(runs) for i in range(length)]
                 for n in LOOK_NAMES},
        "floor": least if floor else None,
        "num_samples": runs[0][0].num_samples,
        "worst_ratio": of_seeds(lambda s: s.worst_distance, plain),
        "last_ratio": of_seeds(lambda s: s.last_distance, plain),
        "worst_look": {n: max((s.worst_look[n] for s in plain), key=distance_from_one)
                       for n in LOOK_NAMES},
        "above_floor": {"worst_ratio": of_seeds(lambda s: s.worst_distance, above)},
    }  # fmt: skip
    for minute in (10, 60):
        if length >= 6 * minute:
            summary[f"minute_{minute}_ratio"] = of_seeds(lambda s, m=minute: s.distance_at(m), plain)
            summary["above_floor"][f"minute_{minute}_ratio"] = of_seeds(lambda s, m=minute: s.distance_at(m), above)
    return summary


def values_of(parts: Sequence[Part]) -> list[Values]:
    return [part.values for part in parts]
