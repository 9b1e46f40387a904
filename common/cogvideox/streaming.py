"""A running video stream: window, control, noise and decoder put together.

Shapes: B batch, F latent frames of the window, W frames per group, C latent channels, H W latent height/width, N raw
frames of a chunk (4·W, the first time 4·W+1), h w pixels.
"""

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from common.cogvideox.chunk_decoder import ChunkDecoder
from common.cogvideox.guidance import GuidedDenoiser
from common.cogvideox.noise_schedule import apply_step
from common.cogvideox.signal_sources import SignalSource
from common.cogvideox.window import InnerStep, WindowPlan, WindowState
from common.cogvideox.window_scheduler import SwinSchedulerMixin


class VideoStream(Iterator[np.ndarray]):
    """Iterator of uint8 chunks [N,h,w,3] ([B,N,h,w,3] for several streams at once), without end unless told.

    Every `next` does one shift and decodes what it finished. A player that wants to do the two on different devices or
    threads calls `advance` and `decode` itself. Nothing is computed and no signal asked for before it is needed, so a
    stream's chunks do not depend on how many will follow. With `overlap` the next shift is begun before this chunk's
    frames are waited for: on GPUs more frames a second, of the same content; but commands are read a chunk earlier.

    Args:
        denoiser: transformer, prompt and guidance.
        scheduler, plan: of one another; see `make_window_plan`.
        decoder: a fresh one.
        sources: B signal sources.
        latent_shape: [B,F,C,H,W].
        generator: one for all that is drawn, or one a stream of the batch.
        init_latents: scaled latents [B,F,C,H,W] to start from; None starts from the prompt alone.
        num_chunks: how many chunks, None for no end.
        overlap: whether a chunk is decoded while the next shift is made.
    """

    def __init__(
        self,
        denoiser: GuidedDenoiser,
        scheduler: SwinSchedulerMixin,
        plan: WindowPlan,
        decoder: ChunkDecoder,
        sources: Sequence[SignalSource],
        latent_shape: Sequence[int],
        generator: torch.Generator | list[torch.Generator],
        init_latents: Tensor | None = None,
        num_chunks: int | None = None,
        overlap: bool = False,
    ):
        self.denoiser, self.scheduler, self.plan, self.decoder = denoiser, scheduler, plan, decoder
        self.sources, self.generator = sources, generator
        self.num_chunks, self.num_chunks_done, self.overlap = num_chunks, 0, overlap
        self._ahead: Tensor | Exception | None = None  # what `shift` gave, made while the last chunk was decoded
        self.latent_shape = tuple(latent_shape)
        self._init_latents = init_latents
        self._state: WindowState | None = None

    def __next__(self) -> np.ndarray:
        if self._ahead is None and self._is_over():
            raise StopIteration
        frames = self.decoder.submit(self.advance())
        if self.overlap and not self._is_over():
            try:
                self._ahead = self.shift()
            except Exception as error:  # the frames that are being decoded are not to be lost with it
                self._ahead = error
        return frames.result()

    def _is_over(self) -> bool:
        return self.num_chunks is not None and self.num_chunks_done >= self.num_chunks

    @torch.no_grad()
    def change_prompt(self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None = None) -> None:
        """From the next shift on the stream is told another prompt; window, noise and decoder go on as they are.

        The frames already in the window keep what they have of the old prompt, so the picture turns over within a
        window's length. Call it between two shifts, from the thread that makes them. With `overlap` one shift is made
        ahead already.

        Args:
            prompt_embeds: [B,L,text_embed_dim] as `encode_prompt` makes them, of the same length L as before.
            negative_prompt_embeds: the same of what guidance leads away from; needed only where guidance is on text.
        """
        # A denoiser of its own, so that a stream which shares the old one hears nothing of it.
        old = self.denoiser
        embeds = [prompt_embeds if branch.use_text else negative_prompt_embeds for branch in old.branches]
        hidden_states = torch.cat(embeds).to(old.device, old.dtype)  # [K·B,L,·]
        before = old.constants["encoder_hidden_states"]
        if hidden_states.shape != before.shape:
            raise ValueError(f"the new prompt is {tuple(hidden_states.shape)}, the old one {tuple(before.shape)}")
        self.denoiser = copy(old)
        self.denoiser.constants = {**old.constants, "encoder_hidden_states": hidden_states}

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents as `advance` returns them, in that order → uint8 [N,h,w,3] or [B,N,h,w,3]."""
        return self.decoder.decode_uint8(latents)

    def advance(self) -> Tensor:
        """The latent frames [B,W,C,H,W] of the next shift, float32; the first time also the condition."""
        latents, self._ahead = self._ahead, None
        if isinstance(latents, Exception):
            raise latents
        return self.shift() if latents is None else latents

    @torch.no_grad()
    def shift(self) -> Tensor:
        """Makes one shift, whatever was made ahead; → as `advance`."""
        is_first = self._state is None
        width = self.plan.frames_per_group
        state = self._start() if is_first else self._state.shift(self._noise(width))
        condition = self._noisy_condition(state)
        control = self._control(state.first_frame)  # asked for as late as can be
        for step in self.plan.steps:
            state = self._denoise(state, step, control, condition)
        self._state = state
        self.num_chunks_done += 1
        return state.latents[:, (0 if is_first else 1) : 1 + width]

    def _noise(self, num_frames: int) -> Tensor:
        batch, _, *rest = self.latent_shape
        shape = (batch, num_frames, *rest)
        return randn_tensor(shape, generator=self.generator, device=self.denoiser.device, dtype=torch.float32)

    def _control(self, first_frame: int) -> Tensor | None:
        indices = [source.window(first_frame, self.plan.num_frames) for source in self.sources]  # [B][F][R]
        return self.denoiser.control_embeds(indices)

    def _noisy_condition(self, state: WindowState) -> Tensor | None:
        """The condition frame [B,1,C,H,W] as the transformer is to see it, None for as it is."""
        if self.plan.condition_timestep is None:
            return None
        return self.scheduler.add_noise(state.latents[:, :1], self._noise(1), self.plan.condition_timestep)

    def _denoise(
        self, state: WindowState, step: InnerStep, control: Tensor | None, condition: Tensor | None
    ) -> WindowState:
        latents = state.latents
        if condition is not None:
            latents = torch.cat([condition, latents[:, 1:]], dim=1)
        output = self.denoiser(latents, step.timesteps, control)
        noise = None if step.coefficients.noise is None else self._noise(self.plan.num_frames - 1)
        return state.step(step.coefficients, output, noise)

    def _start(self) -> WindowState:
        """A clean window, from the init video or sampled at one noise level for all frames, re-noised to its levels."""
        clean = self._sample_uniformly() if self._init_latents is None else self._init_latents
        self._init_latents = None
        frames = clean[:, 1:]
        frames = self.scheduler.add_noise(frames, self._noise(frames.shape[1]), self.plan.entry_timesteps[None])
        return WindowState(torch.cat([clean[:, :1], frames], dim=1))

    def _sample_uniformly(self) -> Tensor:
        """A whole clip [B,F,C,H,W] from noise, one timestep for all its frames."""
        num_frames = self.plan.num_frames
        latents, old_x0 = self._noise(num_frames), None
        control = self._control(first_frame=0)
        for step in self.plan.uniform:
            output = self.denoiser(latents, step.timesteps, control)
            noise = None if step.coefficients.noise is None else self._noise(num_frames)
            latents, old_x0 = apply_step(step.coefficients, latents, output, old_x0, noise)
        return latents
