"""Writing H.264 files: a stream frame by frame, with memory that does not grow, or a finished clip at once.

Shapes: N raw frames · h w pixels, both even.
"""

import os
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
import numpy as np

from common.config.errors import UserError
from common.config.files import replacing

# Fragments make a file playable up to wherever it was cut off, by a crash too, at the price of slower
# seeking.
GROWING = ("-movflags", "+frag_keyframe+empty_moov+default_base_moof")


class VideoWriter:
    """An mp4 that grows: `with VideoWriter(path, fps=16) as video: video.write(chunk)`.

    Args:
        path: ends in .mp4; its folder is made.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) … 51.
        gop: frames from key frame to key frame; two seconds by default.
        options: further ffmpeg options.
    """

    def __init__(
        self, path: str | os.PathLike, fps: float, crf: int = 16, gop: int | None = None, options: tuple = GROWING
    ):
        self.path, self.fps, self.num_frames, self._sink = Path(path), fps, 0, None
        if self.path.suffix != ".mp4":
            raise UserError(f"{self.path}: a video's name has to end in .mp4")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._is_new = not self.path.exists()
            self.path.open("ab").close()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
        # One thread, and no dates or versions inside: the same frames give the same bytes.
        encoding = ["-crf", str(crf), "-preset", "veryfast", "-g", str(gop or round(2 * fps))]
        self._options = [*encoding, "-threads", "1", "-fflags", "+bitexact", *options]

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 frames [N,h,w,3], of the same size at every call."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [N,h,w,3]")
        if self._sink is None:
            height, width = frames.shape[1:3]
            self._sink = imageio_ffmpeg.write_frames(
                str(self.path), (width, height), fps=self.fps, codec="libx264", pix_fmt_in="rgb24",
                pix_fmt_out="yuv420p", quality=None, macro_block_size=2, output_params=self._options,
            )  # fmt: skip
            self._sink.send(None)
        for frame in frames:
            self._sink.send(np.ascontiguousarray(frame))
            self.num_frames += 1

    def close(self) -> None:
        """Finishes the file; without a frame there is none, or still the one that was there."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None
        elif self.num_frames == 0 and self._is_new:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_frames(video: np.ndarray) -> np.ndarray:
    """A pipeline's output of type "np", [N,h,w,3] of [0,1], as uint8."""
    return (video * 255).round().astype(np.uint8)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float, crf: int = 16, gop: int | None = None) -> None:
    """Writes a finished clip, uint8 [N,h,w,3], beside `path` first: under its name it is always whole."""
    with replacing(path) as beside, VideoWriter(beside, fps, crf, gop, options=()) as writer:
        writer.write(frames)
