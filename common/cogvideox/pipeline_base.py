"""What both pipelines share: components, directories, text, and the guided denoiser.

Shapes: B batch, L text tokens, D text width.
"""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.float8 import Float8Linear
from common.cogvideox.guidance import GuidedDenoiser, guidance_branches, guidance_scale_embedding
from common.cogvideox.pipeline_io import load_components, write_pipeline
from common.config.errors import UserError


class ControlPipelineBase(CogVideoXPipeline):
    """`CogVideoXPipeline` with a control vocabulary, reading and writing our own directories."""

    _optional_components = ["control_vocabulary"]

    def __init__(
        self, tokenizer, text_encoder, vae, transformer, scheduler, control_vocabulary: ControlVocabulary | None = None
    ):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(control_vocabulary=control_vocabulary)
        model_dim = getattr(transformer.config, "control_dim", None)
        vocabulary_dim = None if control_vocabulary is None else control_vocabulary.control_dim
        if model_dim != vocabulary_dim:
            raise UserError(f"the transformer's control_dim is {model_dim}, the control vocabulary's {vocabulary_dim}")

    @property
    def device(self) -> torch.device:
        """Where video is denoised; the VAE may be elsewhere, and the text encoder gone."""
        return self.transformer.device

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype | None = None, **components: Any):
        """A pipeline from a directory (or hub id) that any stage wrote; `components` replace those stored there.

        Raises:
            TypeError: for anything else that diffusers takes here, as device_map, before weights are read.
        """
        if unknown := components.keys() - signature(cls.__init__).parameters.keys():
            raise TypeError(f"from_pretrained takes torch_dtype and components, not {', '.join(sorted(unknown))}")
        return cls(**{**load_components(path, torch_dtype, **components), **components})

    def save_pretrained(self, path: str | Path) -> None:
        """Writes every component and, last, model_index.json; `from_pretrained` reads it back.

        Raises:
            UserError: the pipeline was made for speed, and is not whole any more; or a LoRA is attached to it.
        """
        if getattr(self.transformer, "peft_config", None):
            raise UserError(f"{path}: a LoRA is attached; before saving, fuse_lora() and unload_lora_weights()")
        if self.text_encoder is None or any(isinstance(m, Float8Linear) for m in self.transformer.modules()):
            raise UserError(f"{path}: a pipeline without text encoder or in float8 cannot be saved; save it before")
        given = {name: component for name, component in self.components.items() if component is not None}
        write_pipeline(path, None, type(self).__name__, given)

    def _resolution(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels, by default the transformer's own; a `UserError` when they do not divide into patches."""
        config, scale = self.transformer.config, self.vae_scale_factor_spatial
        height, width = height or config.sample_height * scale, width or config.sample_width * scale
        multiple = scale * config.patch_size
        if height % multiple or width % multiple:
            raise UserError(f"height {height} and width {width} have to be multiples of {multiple}")
        return height, width

    def _text_embeds(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        max_sequence_length: int | None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_videos_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """(prompt, negative prompt) each [B,L,D]; the length is the transformer's own by default."""
        if num_videos_per_prompt > 1 and (prompt_embeds is not None or negative_prompt_embeds is not None):
            raise UserError("num_videos_per_prompt goes with prompts; repeat the rows of prompt_embeds instead")
        if self.text_encoder is None and (prompt_embeds is None or negative_prompt_embeds is None):
            raise UserError("the text encoder is gone: give prompt_embeds and negative_prompt_embeds, not prompts")
        return self.encode_prompt(
            prompt,
            negative_prompt,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length or self.transformer.config.max_text_seq_length,
            device=self._execution_device,
        )

    def _denoiser(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        guidance_scale: float,
        control_guidance_scale: float,
        resolution: tuple[int, int],
        num_latent_frames: int,
        attention_kwargs: dict | None = None,
    ) -> GuidedDenoiser:
        config, device = self.transformer.config, self._execution_device
        embedding = rotary = None
        if getattr(config, "cond_proj_dim", None):  # told its guidance scale: one forward
            scales = torch.full((len(prompt_embeds),), float(guidance_scale), device=device)
            embedding, guidance_scale = guidance_scale_embedding(scales, config.cond_proj_dim), 1.0
        if config.use_rotary_positional_embeddings:
            rotary = self._prepare_rotary_positional_embeddings(*resolution, num_latent_frames, device)
        has_control = self.control_vocabulary is not None
        return GuidedDenoiser(
            self.transformer,
            guidance_branches(guidance_scale, control_guidance_scale if has_control else 1.0),
            prompt_embeds,
            negative_prompt_embeds,
            self.control_vocabulary,
            rotary,
            embedding,
            attention_kwargs,
        )
