"""The clips of an index, decoded whole.

Shapes: n frames of a clip · h w picture size in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from torch import Tensor
from tqdm import tqdm

from common.config.errors import UserError
from common.data.index import ClipRecord
from common.data.video import ClipError, ClipTooShort, Video


def decode_clip(record: ClipRecord, num_frames: int, height: int, width: int) -> Tensor:
    """All frames, uint8 [n, 3, h, w]; a UserError names the index entry of a clip that is unreadable or has
    fewer than `num_frames`."""
    try:
        video = Video(record.path)
        if len(video) < num_frames:
            raise ClipTooShort(f"{record.path}: {len(video)} frames; windows of {num_frames} need a longer clip")
        return video.read(np.arange(len(video)), height, width)
    except ClipError as error:
        raise UserError(f"index entry {record.entry}: {error}") from error


def decode_clips(records: Sequence[ClipRecord], num_frames: int, height: int, width: int) -> list[Tensor]:
    """Every clip, decoded by as many threads as there are cores."""
    decode = partial(decode_clip, num_frames=num_frames, height=height, width=width)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(decode, records), total=len(records), desc="decoding clips", unit="clip"))
