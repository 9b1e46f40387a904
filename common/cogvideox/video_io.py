"""Writing video files frame by frame, so that an endless stream needs no memory and a stopped one leaves a video.

Shapes: N frames of a chunk, h w pixels.
"""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import imageio
import numpy as np

from common.config.errors import UserError


class VideoWriter:
    """An H.264 mp4 that grows as frames come. Use it as a context manager: whatever ends the block, the file plays.

    Args:
        path: must end in .mp4; its folder is made.
        fps: frames a second.
        quality: 0 … 10, imageio's scale.
    """

    def __init__(self, path: str | Path, fps: float = 16, quality: float = 8):
        self.path, self.num_frames = Path(path), 0
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"a video is written as .mp4, not as {self.path.name!r}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Sizes are whatever the model makes; imageio's default would scale them to multiples of 16.
        self._writer = imageio.get_writer(
            str(self.path), format="FFMPEG", mode="I", fps=fps, codec="libx264", quality=quality, macro_block_size=2
        )

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 [N,h,w,3], h and w even and always the same."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [N,h,w,3]")
        for frame in frames:
            self._writer.append_data(frame)
        self.num_frames += len(frames)

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_video(path: str | Path, chunks: Iterable[np.ndarray], fps: float = 16, quality: float = 8) -> int:
    """Writes chunks uint8 [N,h,w,3] as they come; → number of frames."""
    with VideoWriter(path, fps, quality) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return writer.num_frames
