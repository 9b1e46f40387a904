"""Training benchmarks for a terminal: runs side by side. A row is what common.tools.benchmark_training measured.

    python -m common.tools.benchmark_training_table outputs/benchmark_training/2b/*.json

shows those of several files in one table.
"""

import json
from pathlib import Path
from typing import Any

from common.config.command_line import ArgumentParser
from common.config.errors import UserError, one_line, run_cli

# heading, key of a row, format
COLUMNS = (
    ("s/step", "s_per_step", ".4f"),
    ("samples/s", "samples_per_s", ".3f"),
    ("tokens/s", "video_tokens_per_s", ",.0f"),
    ("TFLOP/s", "tflops_per_s", ".4g"),
    ("MFU", "mfu", ".1%"),
    ("allocated", "peak_allocated_gib", ".2f"),
    ("reserved", "peak_reserved_gib", ".2f"),
    ("loading", "peak_loading_gib", ".2f"),
    ("ready s", "ready_s", ".0f"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal, and what they were measured on."""
    width = max(len(row["name"]) for row in rows) + 2
    lines = [f"{'':<{width}}{'GPUs':>4}{'frames':>18}" + "".join(f"{heading:>11}" for heading, _, _ in COLUMNS)]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:<{width}}{'out of memory' if row['out_of_memory'] else row['error']}")
            continue
        shape = f"{row['samples_per_step']} × {row['frames']}×{row['height']}×{row['width']}"
        values = ["-" if row[key] is None else format(row[key], form) for _, key, form in COLUMNS]
        line = f"{row['name']:<{width}}{row['processes']:>4}{shape:>18}"
        lines.append(line + "".join(f"{value:>11}" for value in values))
    measured = [row for row in rows if "error" not in row]
    if measured:
        rates = [row["product"]["flops_per_s"] / 1e12 for row in measured]
        size, dtype = measured[0]["product"]["size"], measured[0]["product"]["dtype"]
        reached = f"{min(rates):.4g} to {max(rates):.4g}" if len(rates) > 1 else f"{rates[0]:.4g}"
        steps = " or ".join(str(count) for count in sorted({len(row["step_seconds"]) for row in measured}))
        lines.append(
            f"MFU 100% is a {dtype} product of {size}³: {reached} TFLOP/s; memory in GiB a GPU; median of {steps} steps"
        )
        lines += dict.fromkeys(place(row) for row in measured)
    return "\n".join(lines)


def place(row: dict[str, Any]) -> str:
    """What a row was measured on."""
    cuda = f", CUDA {row['cuda']}, cuDNN {row['cudnn']}" if row["cuda"] else f", {row['threads']} threads"
    return f"{row['device']}, torch {row['torch']}{cuda}, diffusers {row['diffusers']}"


def summary(row: dict[str, Any]) -> str:
    """One line, as soon as a run has ended."""
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    return f"{row['name']}: {row['s_per_step']:.4f} s a step, {row['peak_allocated_gib']:.2f} GiB"


def losses_table(rows: list[dict[str, Any]], count: int) -> str:
    """The first losses of each row that has some, and how far they are from those of the first."""
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return ""
    count = min(count, *(len(row["losses"]) for row in rows))
    widths = [max(len(row["name"]), 10) + 2 for row in rows]
    lines = ["loss" + "".join(f"{row['name']:>{width}}" for row, width in zip(rows, widths, strict=True))]
    for step in range(count):
        values = zip(rows, widths, strict=True)
        lines.append(f"{step + 1:>4}" + "".join(f"{row['losses'][step]:>{width}.6f}" for row, width in values))
    for row in rows[1:]:
        pairs = zip(row["losses"][:count], rows[0]["losses"], strict=False)
        error = max(abs(mine - first) / abs(first) for mine, first in pairs)
        lines.append(f"{row['name']}: at most {error:.2%} from {rows[0]['name']}")
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a benchmark's JSON; one alone is called like its file. A `UserError` if it is not that."""
    try:
        rows = json.loads(path.read_text())["rows"]
        if not rows or not all("error" in row or row["step_seconds"] for row in rows):
            raise ValueError("no rows")
        return rows if len(rows) > 1 else [rows[0] | {"name": path.stem}]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: no JSON that common.tools.benchmark_training wrote ({one_line(error)})") from error


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of common.tools.benchmark_training")
    print(table([row for path in parser.parse_args().files for row in read_rows(path)]))


if __name__ == "__main__":
    run_cli(main)
