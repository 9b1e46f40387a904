"""Real H.264 files whose every frame carries its own number as a barcode, so that what was read can be checked.

Ten vertical bars, black or white: bit b of the frame number. They survive resizing and compression.
"""

import subprocess
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np

NUM_BITS = 10


def frame_picture(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 [h, w, 3] that says `number`."""
    bits = np.arange(width) * NUM_BITS // width
    return np.broadcast_to(((number >> bits) & 1)[None, :, None] * 255, (height, width, 3)).astype(np.uint8)


def frame_number(picture) -> int:
    """The number in a picture [3, h, w]."""
    row = np.asarray(picture, dtype=np.float32).mean(axis=0)
    row = row[row.shape[0] // 2]
    centres = ((np.arange(NUM_BITS) + 0.5) * len(row) / NUM_BITS).astype(int)
    return int(sum(1 << b for b, x in enumerate(centres) if row[x] > 128))


def frame_numbers(clip) -> list[int]:
    """The numbers in uint8 [N, 3, h, w]."""
    return [frame_number(picture) for picture in clip]


def write_video(path: Path, num_frames: int, fps: str | int = 16, size=(64, 96), options=()) -> Path:
    """Frames 0 … num_frames−1 at `fps` ("30000/1001" is 29.97) as H.264 with B-frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path), (size[1], size[0]), fps=Fraction(fps), codec="libx264", macro_block_size=1,
        output_params=["-crf", "10", "-bf", "2", *options],
    )  # fmt: skip
    writer.send(None)
    for number in range(num_frames):
        writer.send(np.ascontiguousarray(frame_picture(number, *size)))
    writer.close()
    return path


def ffmpeg(*arguments) -> None:
    """Runs the ffmpeg program that imageio brings."""
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)
