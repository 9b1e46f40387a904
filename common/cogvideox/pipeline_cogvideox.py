"""The pipelines: a whole controlled clip, and video without end.

Both read and write our own pipeline directories, which plain diffusers refuses (see pipeline_io.py). What they are made
of: guidance.py, signal_sources.py, window.py, streaming.py, autoencoder.py.

Shapes: B batch, F latent frames, C latent channels, H W latent height/width, N = 4·(F−1)+1 raw frames, h w pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput
from torch import Tensor

from common.cogvideox.autoencoder import StreamingDecoder, encode_frames
from common.cogvideox.chunk_decoder import ChunkDecoder
from common.cogvideox.guidance import GuidedDenoiser, checked_guidance_scale, dynamic_guidance_scale, is_distilled
from common.cogvideox.light_decoder import LightStreamingDecoder, LightVideoDecoder
from common.cogvideox.pipeline_base import ControlPipelineBase
from common.cogvideox.signal_sources import Control, SignalSource, clip_signals, make_signal_source
from common.cogvideox.streaming import VideoStream
from common.cogvideox.window import make_window_plan, num_chunks_for
from common.cogvideox.window_scheduler import SwinSchedulerMixin
from common.config.errors import UserError


class CogVideoXControlPipeline(ControlPipelineBase):
    """`CogVideoXPipeline` that also takes a control signal; without one, and with a transformer without control, it
    makes what diffusers makes.

    Args (those of `CogVideoXPipeline`, and):
        control_vocabulary: names and rows of the signals; needed by a transformer with `control_dim`.
    """

    def _clip_control(
        self, control_signal: Any, batch_size: int, num_latent_frames: int, num_videos: int = 1
    ) -> list[list[list[int]]]:
        """`control_signal` of `__call__` → indices [B][F][R], of the R raw frames of each latent frame.

        Of B clips `num_videos` each are of one prompt, and share a signal if there is one for each prompt.
        """
        one_each = isinstance(control_signal, Sequence) and bool(control_signal)
        one_each = one_each and not isinstance(control_signal, str) and not isinstance(control_signal[0], str | int)
        controls = control_signal if one_each else [control_signal] * batch_size
        if len(controls) not in (batch_size, batch_size // num_videos):
            raise UserError(f"{len(controls)} control signals for {batch_size} prompts; one for all, or one each")
        controls = [control for control in controls for _ in range(batch_size // len(controls))]
        stride = self.vae_scale_factor_temporal
        return [clip_signals(control, num_latent_frames, self.control_vocabulary, stride) for control in controls]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        control_signal: Sequence[str | int] | str | None = None,
        control_guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        max_sequence_length: int | None = None,
    ) -> CogVideoXPipelineOutput | tuple:
        """A clip. Arguments as of `CogVideoXPipeline.__call__`; what differs:

        Args:
            control_signal: names, one a raw frame, or indices, one a latent frame; one name for all; a list of such for
                a list of prompts. None is the null signal.
            num_inference_steps: 50; of a distilled model its own.
            guidance_scale, control_guidance_scale: 6 and 1; see `guidance_branches` and `checked_guidance_scale`.
            use_dynamic_cfg: guidance rises with the step's number (diffusers confuses it with the timestep).
            eta: of no effect, as with CogVideoX's schedulers in diffusers.
            callback_on_step_end: (pipeline, step, timestep, {"latents"}) → {} or {"latents": new ones}.
            max_sequence_length: the transformer's own by default.
        """
        size = height, width = self._resolution(height, width)
        num_frames = self._num_frames(num_frames)
        self.check_inputs(prompt, height, width, negative_prompt, None, prompt_embeds, negative_prompt_embeds)
        guidance_scale = checked_guidance_scale(self.scheduler, guidance_scale, control_guidance_scale, default=6.0)
        if is_distilled(self.scheduler) and use_dynamic_cfg:
            raise UserError("use_dynamic_cfg: the model learnt its guidance when it was distilled; leave it off")
        # What diffusers' properties of these names show, to a callback above all.
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        embeds = self._text_embeds(
            prompt, negative_prompt, max_sequence_length, prompt_embeds, negative_prompt_embeds, num_videos_per_prompt
        )
        batch_size, num_latent_frames = len(embeds[0]), (num_frames - 1) // self.vae_scale_factor_temporal + 1
        signals = self._clip_control(control_signal, batch_size, num_latent_frames, num_videos_per_prompt)

        def denoiser_at(scale: float) -> tuple[GuidedDenoiser, Tensor | None]:
            denoiser = self._denoiser(*embeds, scale, control_guidance_scale, size, num_latent_frames, attention_kwargs)
            return denoiser, denoiser.control_embeds(signals)

        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps or (None if is_distilled(self.scheduler) else 50), device)
        told, timesteps = self.scheduler.timesteps, self.scheduler.timesteps.tolist()
        self._num_timesteps = len(timesteps)
        # Drawn in the text encoder's type, as diffusers does; kept in float32, since 50 roundings to bfloat16 add up.
        latents = self.prepare_latents(
            batch_size, self.transformer.config.in_channels, num_frames, height, width, embeds[0].dtype, device,
            generator, latents,
        ).float()  # fmt: skip
        denoiser, control = denoiser_at(guidance_scale)
        old_x0 = None
        for i, t in enumerate(self.progress_bar(told)):
            if self.interrupt:
                break
            self._current_timestep = t
            if use_dynamic_cfg:
                self._guidance_scale = dynamic_guidance_scale(guidance_scale, i, len(timesteps))
                denoiser, control = denoiser_at(self.guidance_scale)
            output = denoiser(latents, t, control)
            latents, old_x0 = self._scheduler_step(output, latents, old_x0, timesteps, i, generator)
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, i, t, {"latents": latents}).get("latents", latents)
        self._current_timestep = None
        return self._finished(latents, output_type, return_dict)

    def _num_frames(self, num_frames: int | None) -> int:
        """Raw frames, by default the transformer's own; a `UserError` when they are no whole latent frames."""
        num_frames = num_frames or self.transformer.config.sample_frames
        if (num_frames - 1) % self.vae_scale_factor_temporal:
            raise UserError(f"num_frames {num_frames} is not 1 + a multiple of {self.vae_scale_factor_temporal}")
        return num_frames

    def _finished(self, latents: Tensor, output_type: str, return_dict: bool) -> CogVideoXPipelineOutput | tuple:
        video = latents
        if output_type != "latent":
            frames = self.decode_latents(latents.to(self.vae.dtype))
            video = self.video_processor.postprocess_video(video=frames, output_type=output_type)
        self.maybe_free_model_hooks()
        return CogVideoXPipelineOutput(frames=video) if return_dict else (video,)

    def _scheduler_step(
        self,
        output: Tensor,
        latents: Tensor,
        old_x0: Tensor | None,
        timesteps: Sequence[int],
        i: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[Tensor, Tensor]:
        """(latents, x̂0) after step i of a grid that all frames share."""
        if isinstance(self.scheduler, CogVideoXDPMScheduler):
            back = timesteps[i - 1] if i > 0 else None
            return self.scheduler.step(
                output, old_x0, timesteps[i], back, latents, generator=generator, return_dict=False
            )
        return self.scheduler.step(output, timesteps[i], latents, return_dict=False)


class CogVideoXStreamingPipeline(CogVideoXControlPipeline):
    """Video without end from a sliding window (stages 3 and 4). The scheduler says which window and how to solve it."""

    light_decoder: LightVideoDecoder | None = None  # decodes streams in the VAE's place; see speed.py

    def __init__(self, tokenizer, text_encoder, vae, transformer, scheduler, control_vocabulary=None):
        if not isinstance(scheduler, SwinSchedulerMixin):
            raise UserError(
                f"the scheduler is a {type(scheduler).__name__}; streaming needs one of common.cogvideox.scheduler "
                "(stages 3 and 4 write them)"
            )
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler, control_vocabulary)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        control: Control | Sequence[Control] = None,
        init_video: np.ndarray | Tensor | None = None,
        *,
        num_chunks: int | None = None,
        seconds: float | None = None,
        fps: float = 16,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        control_guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        max_sequence_length: int | None = None,
        overlap: bool = False,
    ) -> VideoStream:
        """A stream of uint8 chunks [N,h,w,3]: 1+4·W frames, then 4·W each; [B,N,h,w,3] for several prompts.

        What is asked for is checked and the text encoded at once; all else happens as chunks are taken.

        Args:
            prompt, prompt_embeds: one, or several: that many streams side by side.
            control: None; one name; an iterable (names, one a raw frame, or indices, one a latent frame; the last one
                holds at its end); or a callable that returns the command of the moment, asked once a shift (and once
                more when the stream starts from text). For a list of prompts a list of such.
            init_video: uint8 [N,h,w,3] or [N,3,h,w] (or [B,…]); the stream begins in its last 4·(F−1)+1 frames, and
                without height and width in its size. None: the window is first sampled from the prompt.
            num_chunks, seconds: how long; neither: without end. Chunks are whole: `seconds` is reached, not met.
            num_inference_steps: N over all groups, N/G forwards a shift. Default: `default_inference_steps`.
            guidance_scale, control_guidance_scale: see `guidance_branches`; 1 by default. A distilled model has learnt
                guidance and takes no more; with `cond_proj_dim` it is told the first, see `checked_guidance_scale`.
            seed, generator: of everything that is drawn; a list of generators has one for each stream.
            overlap: decode a chunk while the next shift is made, see `VideoStream`.
        """
        if any(hasattr(model, "_hf_hook") for model in (self.transformer, self.vae)):
            raise UserError(
                "every chunk of a stream needs transformer and VAE: they cannot be offloaded to the CPU; encode the "
                "prompt, set text_encoder to None and move the pipeline to the GPU, as stage4/inference.py does"
            )
        device, spatial = self._execution_device, self.vae_scale_factor_spatial
        plan = make_window_plan(self.scheduler, num_inference_steps, device)
        guidance_scale = checked_guidance_scale(self.scheduler, guidance_scale, control_guidance_scale)
        if seconds is not None:
            num_chunks = num_chunks_for(seconds, fps, plan.frames_per_group * self.vae_scale_factor_temporal)
        video = None if init_video is None else self._init_clip(init_video, plan.num_frames)
        if video is not None and height is None and width is None:
            height, width = video.shape[-2:]
        height, width = self._resolution(height, width)
        self.check_inputs(prompt, height, width, negative_prompt, None, prompt_embeds, negative_prompt_embeds)
        if video is not None and tuple(video.shape[-2:]) != (height, width):
            raise UserError(f"init_video is {video.shape[-2]}×{video.shape[-1]}, the stream {height}×{width} pixels")
        with torch.no_grad():
            embeds = self._text_embeds(
                prompt, negative_prompt, max_sequence_length, prompt_embeds, negative_prompt_embeds
            )
            init_latents = None if video is None else encode_frames(self.vae, video).to(device)
        batch_size, channels = len(embeds[0]), self.transformer.config.in_channels
        if isinstance(generator, list) and len(generator) != batch_size:
            raise UserError(f"{len(generator)} generators for {batch_size} streams; give one, or one each")
        if init_latents is not None and len(init_latents) not in (1, batch_size):
            raise UserError(f"init_video holds {len(init_latents)} videos for {batch_size} streams; one, or one each")
        return VideoStream(
            self._denoiser(*embeds, guidance_scale, control_guidance_scale, (height, width), plan.num_frames),
            self.scheduler,
            plan,
            self.make_decoder(),
            self._sources(control, batch_size, is_one=batch_size == 1 and not isinstance(prompt, list)),
            (batch_size, plan.num_frames, channels, height // spatial, width // spatial),
            generator or self._seeded(seed),
            None if init_latents is None else init_latents.expand(batch_size, -1, -1, -1, -1),
            num_chunks,
            overlap,
        )

    def make_decoder(self) -> ChunkDecoder:
        """A decoder for one new stream."""
        if self.light_decoder is not None:
            return LightStreamingDecoder(self.light_decoder)
        return StreamingDecoder(self.vae)

    def _seeded(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self._execution_device)
        return generator.manual_seed(generator.seed() if seed is None else seed)

    def _sources(self, control: Any, batch_size: int, is_one: bool) -> list[SignalSource]:
        controls = [control] if is_one else [None] * batch_size if control is None else control
        if isinstance(controls, str) or not isinstance(controls, Sequence) or len(controls) != batch_size:
            raise UserError(f"{batch_size} prompts need a list of {batch_size} controls, one each")
        stride = self.vae_scale_factor_temporal
        return [make_signal_source(one, self.control_vocabulary, stride) for one in controls]

    def _init_clip(self, video: np.ndarray | Tensor, num_latent_frames: int) -> Tensor:
        """The last 4·(F−1)+1 frames as uint8 [B,N,3,h,w]; a `UserError` when there are too few."""
        video = torch.as_tensor(video)
        if video.dtype != torch.uint8 or video.ndim not in (4, 5) or 3 not in (video.shape[-1], video.shape[-3]):
            raise UserError(f"init_video is {video.dtype} {tuple(video.shape)}, not uint8 [N,h,w,3] or [N,3,h,w]")
        video = video[None] if video.ndim == 4 else video
        video = video.movedim(-1, -3) if video.shape[-1] == 3 else video
        needed = (num_latent_frames - 1) * self.vae_scale_factor_temporal + 1
        if video.shape[1] < needed:
            raise UserError(f"init_video has {video.shape[1]} frames; the model's window needs {needed}")
        return video[:, -needed:]
