"""An animated GIF of a drive, with the keys that were held.

    python -m common.tools.gif --output drive.gif --seconds 12 drive.mp4

The signals are read from the JSON beside the video, which the stages' inference.py and the player's client write.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.config.command_line import (
    ArgumentParser,
    not_negative_number,
    positive_number,
    refuse_unwritable,
    whole_number,
)
from common.config.errors import UserError, run_cli
from common.config.files import replacing
from common.data.video import Video
from common.tools.contact_sheet import read_signals

COLORS = 128  # of each frame's palette
# Keys as on a keyboard: column and row, the letters of a signal that hold it, and the arrow as points in a unit square.
KEYS = (
    (1, 0, "D", ((0.5, 0.25), (0.8, 0.75), (0.2, 0.75))),
    (0, 1, "L", ((0.25, 0.5), (0.75, 0.2), (0.75, 0.8))),
    (1, 1, "B", ((0.5, 0.75), (0.8, 0.25), (0.2, 0.25))),
    (2, 1, "R", ((0.75, 0.5), (0.25, 0.2), (0.25, 0.8))),
)


def draw_keys(image: Image.Image, signal: str) -> None:
    """Four arrow keys in the lower left corner, lit where `signal` ("DL", "N") holds them."""
    draw, side = ImageDraw.Draw(image, "RGBA"), max(image.height // 12, 6)
    for column, row, letter, arrow in KEYS:
        left, top = 4 + column * (side + 2), image.height - 4 - (2 - row) * (side + 2)
        held = letter in signal
        draw.rounded_rectangle((left, top, left + side, top + side), side // 5,
                               fill=(255, 210, 60, 255) if held else (20, 20, 20, 110))  # fmt: skip
        points = [(left + x * side, top + y * side) for x, y in arrow]
        draw.polygon(points, fill=(20, 20, 20, 255) if held else (255, 255, 255, 150))


def make_gif(path: Path, start: float, seconds: float, fps: float, height: int) -> list[Image.Image]:
    """The frames of a GIF: `seconds` of a video from second `start` on, resized to a height in pixels."""
    video = Video(path)
    times = start + np.arange(round(seconds * fps)) / fps
    chosen = np.searchsorted(video.timestamps, times[times <= video.timestamps[-1]] + 1e-6, side="right") - 1
    if not len(chosen):
        raise UserError(f"--start {start:g}: {path} ends at second {video.timestamps[-1]:.1f}")
    signals = read_signals(path)
    source_height, source_width = video.size
    frames = []
    for index, picture in zip(chosen, video.read(chosen, source_height, source_width), strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        image = image.resize((round(height * source_width / source_height), height), Image.Resampling.LANCZOS)
        if signals:
            draw_keys(image, signals[min(index, len(signals) - 1)])
        frames.append(image.quantize(COLORS, dither=Image.Dither.NONE))
    return frames


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="GIF file to write")
    parser.add_argument("--start", type=not_negative_number, default=0.0, help="second of the video to begin at")
    parser.add_argument("--seconds", type=positive_number, default=10.0, help="length")
    parser.add_argument("--fps", type=positive_number, default=8.0, help="frames a second of the GIF")
    parser.add_argument("--height", type=whole_number(16), default=192, help="pixels")
    args = parser.parse_args()
    if args.output.suffix != ".gif" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .gif")
    refuse_unwritable(args.output.parent, "--output")
    first, *rest = make_gif(args.video, args.start, args.seconds, args.fps, args.height)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as beside:
        first.save(beside, save_all=True, append_images=rest, duration=1000 / args.fps, loop=0, optimize=True)
    print(f"{args.output}: {len(rest) + 1} frames, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
