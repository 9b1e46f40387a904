"""Streams that run while their model is trained: B windows that go on from step to step, and what each is told.

Shapes: B batch · F latent frames of a window, F = 1 + G·W · G noise groups · W frames per group · C latent channels ·
H W latent height/width · R raw frames of a latent frame · L text tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from common.training.encoding import EncodedBatch


def per_frame(of_sample: Tensor) -> Tensor:
    """[B] → [B,1,1,1,1], for [B,F,C,H,W]."""
    return of_sample[:, None, None, None, None]


@dataclass
class Streams:
    """B streams of one window length, between two steps.

    Attributes:
        latents: [B,F,C,H,W], the window before its next shift.
        prompt: [B,L,·].
        signals: int64 [B,2·F−1,R], of the window's frames and of those that enter it in a step.
        finished: int64 [B,R], the signal under which the condition frame was finished.
        is_live: bool [B], told the newest signal for all frames in noise, as at the keyboard, and none ahead of time.
        is_held: bool [B], one signal for as long as the stream lasts.
        is_running: bool [B], False before the first step.
    """

    latents: Tensor
    prompt: Tensor
    signals: Tensor
    finished: Tensor
    is_live: Tensor
    is_held: Tensor
    is_running: Tensor

    @classmethod
    def none_yet(cls, batch: EncodedBatch, num_frames: int) -> "Streams":
        size, control = len(batch), batch.control_indices
        no = torch.zeros(size, dtype=torch.bool, device=control.device)
        return cls(
            latents=batch.latents.new_zeros(size, num_frames, *batch.latents.shape[2:]),
            prompt=torch.zeros_like(batch.prompt_embeds),
            signals=control.new_zeros(size, 2 * num_frames - 1, control.shape[2]),
            finished=control.new_zeros(size, control.shape[2]),
            is_live=no, is_held=no.clone(), is_running=no.clone(),
        )  # fmt: skip

    @property
    def num_frames(self) -> int:
        return self.latents.shape[1]

    def begin(self, starts: Tensor, prompt: Tensor, piece: Tensor, is_live: Tensor, is_held: Tensor) -> "Streams":
        """Those of `starts` [B] with another prompt and other signals; their latents are the caller's to make.

        Args:
            piece: int64 [B,2·F−1,R]. A stream that holds keeps the first of them.
        """
        is_live, is_held = torch.where(starts, is_live, self.is_live), torch.where(starts, is_held, self.is_held)
        first = torch.where(is_held[:, None, None], piece[:, :1, -1:], piece)
        return replace(
            self,
            prompt=torch.where(starts[:, None, None], prompt, self.prompt),
            signals=torch.where(starts[:, None, None], first, self.signals),
            finished=torch.where(starts[:, None], first[:, 1, -1:], self.finished),
            is_live=is_live,
            is_held=is_held,
            is_running=torch.ones_like(self.is_running),
        )

    def told(self, first_frame: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
        """What a window that begins at `first_frame` [B] is told [B,F,R], and the newest signal [B,R].

        As `ScheduledSignals` and `LiveSignals` of common.cogvideox.signal_sources: a live stream is told the newest for
        all frames but the condition, which keeps the one it was finished under.
        """
        width = self.signals.shape[2]
        frames = first_frame[:, None] + torch.arange(self.num_frames, device=first_frame.device)  # [B,F]
        ahead = self.signals.gather(1, frames[:, :, None].expand(-1, -1, width))
        newest = ahead[:, 1, -1:].expand(-1, width)
        live = torch.cat([finished[:, None], newest[:, None].expand(-1, self.num_frames - 1, -1)], dim=1)
        return torch.where(self.is_live[:, None, None], live, ahead), newest

    def go_on(self, starts: Tensor, latents: Tensor, finished: Tensor, piece: Tensor) -> "Streams":
        """After a step: a window further along, but for those that `starts` [B] made, which have only their first.

        Args:
            piece: int64 [B,2·F−1,R], of which F − 1 follow what was told so far, where no signal is held.
        """
        entering = self.num_frames - 1
        more = torch.where(self.is_held[:, None, None], self.signals[:, -1:, -1:], piece[:, :entering])
        later = torch.cat([self.signals[:, entering:], more], dim=1)
        signals = torch.where(starts[:, None, None], self.signals, later)
        return replace(self, latents=latents.detach(), finished=finished, signals=signals)

    def copy_(self, other: "Streams") -> None:
        """In place: a recorded step finds its streams where they were."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


class StreamsByLength(dict[int, Streams]):
    """Window length F → its streams, with a module's `state_dict` and `load_state_dict`: all processes' streams."""

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for length, streams in sorted(self.items()):
            for field in fields(streams):
                value = getattr(streams, field.name)
                # As numbers: not every way of gathering knows bool.
                state[f"{length}.{field.name}"] = gather(value.to(torch.uint8) if value.dtype == torch.bool else value)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        process = PartialState()
        for length in {int(name.split(".")[0]) for name in state}:
            mine = {}
            for field in fields(Streams):
                rows = state[f"{length}.{field.name}"].chunk(process.num_processes)[process.process_index]
                mine[field.name] = (rows.bool() if field.name.startswith("is_") else rows).to(process.device)
            self[length] = Streams(**mine)
