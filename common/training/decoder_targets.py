"""What a light decoder learns from: windows of clips as latents, and the VAE's own picture of them, made once.

A VAE's encode and decode of a window take ten times and more as long as the light decoder's training step on it, so
every window is kept, on disk, where the system's page cache makes it as fast as memory and an interrupted run finds it
again. Its size is known before and bounded by the caller.

Latents are the posterior's means. Pictures are the VAE's *streaming* decode, with its chunks of two latents: what a
stream would show. They are kept as the uint8 levels that a stream would show, too.

Shapes: B batch, F latent frames, C latent channels, H W latent height/width, N = 4·(F−1)+1 raw frames, h w pixels, r
pixels to a side of a latent, n windows.
"""

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from common.cogvideox.autoencoder import StreamingDecoder, encode_frames
from common.cogvideox.chunk_decoder import to_uint8
from common.config.errors import SettingError
from common.config.files import replace_text
from common.data.buckets import Bucket, SampleKey, permuted
from common.data.dataset import VideoDataset
from common.training.interruption import StopRequest
from common.training.random import derive_seed

logger = logging.getLogger(__name__)

READ_AHEAD = 4  # windows, or batches of them, read while the device is busy
FLUSH_EVERY = 16  # windows


def ahead(function: Callable[[Any], Any], items: Iterable[Any], count: int = READ_AHEAD) -> Iterator[Any]:
    """`map`, with threads that are `count` items ahead; what they do here leaves Python to others most of the time."""
    with ThreadPoolExecutor(count) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def reconstruct(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B,N,3,h,w] → scaled latents [B,F,C,H,W], and the VAE's decode of them, [B,N,3,h,w] of about [−1,1]."""
    latents = encode_frames(vae, pixels)
    return latents, StreamingDecoder(vae).decode(latents).float()


def window_bytes(bucket: Bucket, latent_channels: int, factor: int) -> int:
    """What a window takes on disk."""
    latent = latent_channels * (bucket.height // factor) * (bucket.width // factor)
    return bucket.num_frames * 3 * bucket.height * bucket.width + 4 * bucket.num_latent_frames * latent


class DecoderTargets:
    """n windows in `directory`, memory-mapped: latents float32 [n,F,C,H,W], pictures uint8 [n,N,h,w,3].

    Args:
        directory: made if need be; holds what an earlier run of the same settings left there.
        videos: of one bucket; windows go round its clips, in an order that has nothing to do with the index's (not all
            may have a window), and each time around is another draw.
        count: n.
        latent_channels, factor: of the VAE: C, and r.
    """

    def __init__(self, directory: Path, videos: VideoDataset, count: int, latent_channels: int, factor: int):
        self.directory, self.videos, self.count = directory, videos, count
        bucket = videos.buckets[0]
        height, width = bucket.height // factor, bucket.width // factor
        directory.mkdir(parents=True, exist_ok=True)
        self._refuse_too_little_space(count * window_bytes(bucket, latent_channels, factor))
        latent_shape = (count, bucket.num_latent_frames, latent_channels, height, width)
        self.latents = self._map("latents.f32", np.float32, latent_shape)
        self.pictures = self._map("pictures.u8", np.uint8, (count, bucket.num_frames, bucket.height, bucket.width, 3))
        self.factor = factor

    def _map(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        path = self.directory / name
        return np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape)  # sparse until written

    def _refuse_too_little_space(self, needed: int) -> None:
        """Writing to mapped memory that no disk has room for ends the process without a word."""
        taken = sum(512 * path.stat().st_blocks for path in self.directory.iterdir())
        free = shutil.disk_usage(self.directory).free
        if needed > taken + free:
            gib = ", ".join(f"{size / 2**30:.3g} GiB" for size in (needed, taken + free))
            raise SettingError("cache_gib", f"the windows take (needed, free) {gib} in {self.directory}; give less")

    @property
    def num_done(self) -> int:
        path = self.directory / "done.json"
        return json.loads(path.read_text())["windows"] if path.exists() else 0

    def _note(self, num_done: int) -> None:
        self.latents.flush()
        self.pictures.flush()
        replace_text(self.directory / "done.json", json.dumps({"windows": num_done}) + "\n")

    def fill(self, vae: AutoencoderKLCogVideoX, stop: StopRequest, progress: Callable[[int], object]) -> bool:
        """Makes the windows that are missing; False if asked to stop before the last."""
        done = self.num_done
        num_records = len(self.videos.records)
        keys = [
            SampleKey(permuted(i % num_records, num_records, "decoder windows"), 0, i // num_records)
            for i in range(done, self.count)
        ]
        progress(done)
        for sample in ahead(self.videos.__getitem__, keys):
            latents, frames = reconstruct(vae, sample["pixel_values"][None])
            self.latents[done] = latents[0].cpu().numpy()
            self.pictures[done] = to_uint8(frames[0]).cpu().numpy()
            done += 1
            progress(1)
            if done % FLUSH_EVERY == 0 or done == self.count or stop.agreed():
                self._note(done)
            if stop.agreed() and done < self.count:
                return False
        return True

    def batch(self, seed: int, step: int, batch_size: int, crop: int | None) -> tuple[Tensor, Tensor]:
        """A step's batch, a function of (seed, step): latents [B,F,C,H',W'] and the pictures uint8 [B,N,r·H',r·W',3].

        Args:
            crop: latents to a side of the part of the picture that each sample shows; None for all of it.
        """
        rng = np.random.default_rng(derive_seed("decoder", seed, step))
        height, width = self.latents.shape[-2:]
        rows, columns = min(crop or height, height), min(crop or width, width)
        latents, pictures = [], []
        for number in rng.integers(self.count, size=batch_size):
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            latents.append(self.latents[number, ..., top : top + rows, left : left + columns])
            y, x = self.factor * top, self.factor * left
            pictures.append(self.pictures[number, :, y : y + self.factor * rows, x : x + self.factor * columns])
        return torch.from_numpy(np.stack(latents)), torch.from_numpy(np.stack(pictures))


def choose_count(wanted: int, bucket: Bucket, latent_channels: int, factor: int, gib: float) -> int:
    """How many windows fit into `gib`, `wanted` at most. A SettingError if none does."""
    each = window_bytes(bucket, latent_channels, factor)
    count = min(wanted, int(gib * 2**30 / each))
    if count < 1:
        raise SettingError("cache_gib", f"{gib:g} is too little: a window of {bucket} takes {each / 2**30:.3g} GiB")
    if count < wanted:
        logger.warning("cache_gib %g holds %d of %d windows; the others are left out", gib, count, wanted)
    return count
