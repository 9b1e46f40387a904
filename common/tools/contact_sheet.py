"""A picture of several videos: one row each, the commanded signal drawn over every frame.

    python -m common.tools.contact_sheet --output sheet.png "stage 3=drive3.mp4" "stage 4=drive4.mp4"

The signals are read from the JSON beside a video, which the stages' inference.py writes.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.config.command_line import ArgumentParser, refuse_unwritable, whole_number
from common.config.errors import UserError, run_cli
from common.data.video import Video

LABEL_WIDTH = 90
GAP = 2


def make_contact_sheet(rows: list[tuple[str, Path]], num_columns: int = 10, frame_height: int = 96) -> Image.Image:
    """One row a video: its label, then `num_columns` frames evenly spread from its first to its last."""
    drawn = [(label, draw_row(path, num_columns, frame_height)) for label, path in rows]
    width = LABEL_WIDTH + max(row.width for _, row in drawn)
    sheet = Image.new("RGB", (width, len(drawn) * (frame_height + GAP) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, row) in enumerate(drawn):
        top = i * (frame_height + GAP)
        sheet.paste(row, (LABEL_WIDTH, top))
        draw.multiline_text((4, top + 4), label, fill="black", font=ImageFont.load_default(13))
    return sheet


def draw_row(path: Path, num_columns: int, frame_height: int) -> Image.Image:
    video = Video(path)
    chosen = np.linspace(0, len(video) - 1, num_columns).round().astype(int)
    height, width = video.size
    pictures = video.read(chosen, height, width).permute(0, 2, 3, 1).numpy()  # [num_columns,h,w,3]
    signals = read_signals(path)
    frame_width = round(frame_height * width / height)
    row = Image.new("RGB", (num_columns * (frame_width + GAP) - GAP, frame_height), "white")
    for column, (frame, picture) in enumerate(zip(chosen, pictures, strict=True)):
        image = Image.fromarray(picture).resize((frame_width, frame_height), Image.Resampling.LANCZOS)
        draw = ImageDraw.Draw(image)
        seconds = f"{video.timestamps[frame]:.1f}s"
        draw.text((frame_width - 4, frame_height - 3), seconds, "white", ImageFont.load_default(10), "rs", **OUTLINE)
        if signals:
            # One signal a raw frame; the last one holds.
            signal = signals[min(frame, len(signals) - 1)]
            draw.text((4, 3), signal, "yellow", ImageFont.load_default(16), **OUTLINE)
        row.paste(image, (column * (frame_width + GAP), 0))
    return row


OUTLINE = {"stroke_width": 1, "stroke_fill": "black"}


def read_signals(video: Path) -> list[str] | None:
    """One signal per raw frame from the JSON beside a video, None without one."""
    about = video.with_suffix(".json")
    if not about.is_file():
        return None
    try:
        control = json.loads(about.read_text()).get("control")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{about} is not the JSON that inference.py writes; remove it, or make the video anew"
        ) from error
    return control.split(",") if control else None


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("rows", nargs="+", metavar="LABEL=VIDEO", help="one row each, from top to bottom")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--columns", type=whole_number(1), default=10, help="frames per row")
    parser.add_argument("--frame_height", type=whole_number(16), default=96, help="pixels")
    args = parser.parse_args()
    rows = []
    for row in args.rows:
        label, equals, path = row.partition("=")
        if not equals:
            raise UserError(f"{row!r}: write LABEL=VIDEO")
        rows.append((label, Path(path)))
    if args.output.suffix != ".png" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .png")
    refuse_unwritable(args.output.parent, "--output")
    sheet = make_contact_sheet(rows, args.columns, args.frame_height)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"contact sheet: {args.output}")


if __name__ == "__main__":
    run_cli(main)
