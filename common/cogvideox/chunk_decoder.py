"""Decoders of a stream: what they share is how frames come from a device to host memory without anybody waiting.

Shapes: B batch, F latent frames of a chunk, N raw frames, C latent channels, H W latent height/width, h w pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor


def to_uint8(frames: Tensor) -> Tensor:
    """[…,3,h,w] of [−1,1] → uint8 […,h,w,3], rounded and transposed where `frames` live."""
    levels = ((frames.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous()


class PendingFrames:
    """Frames that a device may still be computing: uint8 [B,N,h,w,3] in host memory once `result` returns."""

    def __init__(self, levels: Tensor, done: torch.cuda.Event | None = None):
        self._levels, self._done = levels, done

    def result(self) -> np.ndarray:
        """Waits for the frames; [N,h,w,3] for a batch of one."""
        if self._done is not None:
            self._done.synchronize()
        frames = self._levels.numpy()
        return frames[0] if len(frames) == 1 else frames


@cache
def decoding_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device, for all decoders: PyTorch keeps freed memory apart by stream, and a new video needs the last's."""
    return torch.cuda.Stream(device)


class ChunkDecoder(ABC):
    """One stream's decoder: chunks of latents in, their frames out; what the next chunk needs is kept in here.

    Args:
        device: where it decodes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = decoding_stream(device) if device.type == "cuda" else None

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The next chunk.

        Args:
            latents: [B,F,C,H,W] as the transformer makes them, that is scaled; any type and device, any F ≥ 1.

        Returns:
            [B,N,3,h,w], about [−1,1], in the decoder's type and on its device.
        """

    @contextmanager
    def on_stream(self, latents: Tensor) -> Iterator[None]:
        """Within it a GPU is told what to do in the decoder's own queue (CUDA stream), once `latents` are ready.

        All of a stream's chunks have to be decoded in it, since what one leaves for the next lies in its memory.
        """
        if self._stream is None:
            yield
            return
        if latents.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        if latents.device == self._stream.device:
            latents.record_stream(self._stream)  # its memory is not given to others before this stream has read it
        with torch.cuda.stream(self._stream):
            yield

    def fetch(self, latents: Tensor) -> Tensor:
        """Latents on the decoder's device; not waited for where a GPU keeps the order of things anyway."""
        return latents.to(self.device, non_blocking=self.device.type == "cuda")

    def submit(self, latents: Tensor) -> PendingFrames:
        """As `decode_uint8`, without waiting: a GPU decodes, rounds and copies to pinned memory beside whatever else it
        and others do."""
        if self._stream is None:
            return PendingFrames(to_uint8(self.decode(latents)))
        with self.on_stream(latents):
            levels = to_uint8(self.decode(latents))
            host = torch.empty(levels.shape, dtype=levels.dtype, pin_memory=True).copy_(levels, non_blocking=True)
            return PendingFrames(host, self._stream.record_event())

    def decode_uint8(self, latents: Tensor) -> np.ndarray:
        """As `decode`, → uint8 [N,h,w,3] for a batch of one, else [B,N,h,w,3]."""
        return self.submit(latents).result()
