"""Reading a window of a video file at the model's frame rate, by TIME.

Frame i of a window lies at start + i/fps seconds and is the source frame nearest in time, whatever the
source's rate is (23.976, 29.97, 30, 60, variable). Nothing is indexed past the end, and a clip that is too
short is refused: it is never stretched. Control labels are per source frame; `source_frames` says which ones
a window shows.

Shapes: n source frames · N raw frames of the window · h w picture size in pixels.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from common.config.errors import UserError, one_line

# Time stamps are rounded to the container's time base (1/90000 s and coarser, decord keeps float32).
TIME_TOLERANCE = 1e-3
NARROWEST = 64  # pixels; of H.264 that is narrower decord takes the padding of rows for a fourth colour


class ClipError(UserError):
    """This clip cannot be used; others can."""


class UnreadableVideo(ClipError):
    """The file is missing, empty, truncated, not a video, or without pictures."""


class ClipTooShort(ClipError):
    """The file is sound, but holds too few frames, or frames too far apart, for the window asked for."""


class Video:
    """An open video file.

    Attributes: `path`; `timestamps`, float64 [n], seconds at which each frame appears, the first being 0.
    Raises UnreadableVideo, naming the file and what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise UnreadableVideo(f"{self.path}: there is no such video file")
        if self.path.stat().st_size == 0:
            raise UnreadableVideo(f"{self.path}: the file is empty")
        import decord  # after torch (its libraries clash the other way round), and only where videos are decoded

        decord.logging.set_level(decord.logging.QUIET)
        try:
            # One thread: the loader's workers are the parallelism.
            self._reader = decord.VideoReader(str(self.path), num_threads=1)
            times = self._reader.get_frame_timestamp(list(range(len(self._reader))))[:, 0].astype(np.float64)
        except Exception as error:  # decord raises its own class, RuntimeError or IndexError, by the kind of damage
            if "cannot find video stream" in str(error):
                raise UnreadableVideo(f"{self.path}: holds no pictures (audio only?)") from error
            raise UnreadableVideo(f"{self.path}: is no readable video, or is truncated") from error
        if len(times) == 0 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise UnreadableVideo(f"{self.path}: {len(times)} frames without rising time stamps; encode it anew")
        self.timestamps = times - times[0]

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first picture. Raises UnreadableVideo."""
        return self._decode([0]).shape[1:3]

    def last_start(self, first: int, num_frames: int, fps: float) -> int:
        """The last source frame from which `num_frames` frames at `fps` fit, not before `first`. Raises
        ClipTooShort."""
        try:
            return last_start(self.timestamps, first, num_frames, fps)
        except ClipTooShort as error:
            raise ClipTooShort(f"{self.path}: {error}") from None

    def read(self, frames: np.ndarray, height: int, width: int) -> Tensor:
        """Source frames int [N] as uint8 [N, 3, height, width], resized and cropped. Raises
        UnreadableVideo."""
        wanted, inverse = np.unique(frames, return_inverse=True)  # decord seeks back for a frame asked for twice
        pictures = torch.from_numpy(self._decode(wanted.tolist()))  # [≤N, h, w, 3]
        return resize_and_crop(pictures.permute(0, 3, 1, 2), height, width)[inverse]

    def _decode(self, frames: list[int]) -> np.ndarray:
        try:
            return self._reader.get_batch(frames).asnumpy()
        except Exception as error:
            if "size must exactly match" in str(error):
                what = f"decord cannot read pictures narrower than {NARROWEST} pixels"
                raise UnreadableVideo(f"{self.path}: {what}") from error
            damage = one_line(error)[-80:]
            raise UnreadableVideo(f"{self.path}: cannot be decoded, it is truncated or damaged ({damage})") from error


def last_start(timestamps: np.ndarray, first: int, num_frames: int, fps: float) -> int:
    """See `Video.last_start`; `timestamps` float64 [n] in seconds."""
    if first >= len(timestamps):
        raise ClipTooShort(f"first usable frame is {first}, but it has only {len(timestamps)} frames")
    intervals = len(timestamps) - 1
    source_fps = intervals / timestamps[-1] if intervals else 0.0
    if num_frames > 1 and source_fps < 0.99 * fps:
        raise ClipTooShort(f"runs at {source_fps:.3g} frames per second, fewer than the {fps:g} asked for by fps")
    latest = timestamps[-1] - (num_frames - 1) / fps
    start = int(np.searchsorted(timestamps, latest + TIME_TOLERANCE, side="right")) - 1
    if start < first:
        seconds = timestamps[-1] - timestamps[first]
        raise ClipTooShort(
            f"{seconds:.2f} s from its first usable frame {first} on, {(num_frames - 1) / fps:.2f} s are needed for "
            f"{num_frames} frames at {fps:g} fps"
        )
    return start


def source_frames(timestamps: np.ndarray, start: int, num_frames: int, fps: float) -> np.ndarray:
    """int64 [N]: the source frame nearest in time to each frame of a window that begins at source frame
    `start`."""
    times = timestamps[start] + np.arange(num_frames) / fps
    after = np.searchsorted(timestamps, times - TIME_TOLERANCE).clip(1, max(len(timestamps) - 1, 1))
    after = np.minimum(after, len(timestamps) - 1)
    before = np.maximum(after - 1, 0)
    # Halfway between two frames the earlier one counts, so that rounding in the stamps cannot decide.
    later_is_nearer = timestamps[after] - times < times - timestamps[before] - TIME_TOLERANCE
    return np.where(later_is_nearer, after, before)


def resize_and_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 [N, 3, h, w] → uint8 [N, 3, height, width]: scaled until it covers the target, then its centre is
    cut out."""
    old_height, old_width = frames.shape[-2:]
    scale = max(height / old_height, width / old_width)
    size = (max(round(old_height * scale), height), max(round(old_width * scale), width))
    if size != (old_height, old_width):
        frames = interpolate(frames, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[..., top : top + height, left : left + width].contiguous()


def read_clip(
    path: str | os.PathLike, num_frames: int, height: int, width: int, fps: float, from_end: bool = False
) -> Tensor:
    """The first (or last) `num_frames` frames of a video at `fps`: uint8 [N, 3, height, width]. Raises
    ClipError."""
    video = Video(path)
    last = video.last_start(0, num_frames, fps)
    frames = source_frames(video.timestamps, last if from_end else 0, num_frames, fps)
    return video.read(frames, height, width)
