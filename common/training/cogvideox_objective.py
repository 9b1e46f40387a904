"""What the objectives of all four stages share: frozen components, derived sizes, fixed-timestep validation.

Shapes: B batch · F latent frames · C latent channels · H W latent height/width · S tokens per latent frame.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from common.cogvideox import noise_schedule
from common.cogvideox.compilation import compile_blocks
from common.cogvideox.loading import pixels_per_latent
from common.cogvideox.pipeline_io import (
    component_config,
    load_component,
    read_model_index,
    resolve_pipeline_directory,
)
from common.cogvideox.recomputation import recomputed_layers
from common.cogvideox.rotary import rotary_positional_embeddings
from common.config.errors import SettingError, UserError
from common.config.settings import VAE_TIME_FACTOR
from common.data.video_writer import to_frames
from common.training.encoding import LatentEncoder
from common.training.objective import Objective

TRAIN_TIMESTEPS = 1000  # T of every CogVideoX scheduler; a base with another is refused

# Where the held-out loss is measured: the middle of each quarter of the T timesteps, so that a curve means something.
VALIDATION_TIMESTEPS = (125, 375, 625, 875)


class CogVideoXObjective(Objective):
    """A stage's objective on a CogVideoX pipeline directory. Subclasses set `base_pipeline`.

    Attributes (after `load`):
        base_dir, base_index: the base's directory, and its model_index.json.
        scheduler, alphas: the base's scheduler, and its ᾱ as noise_schedule takes it: [T+1], float64.
        device, weight_dtype: where the models are; the type of frozen ones.
    """

    base_pipeline: str | tuple[str, ...]  # kinds of directory that the stage starts from (`_class_name` in the index)
    default_transformer: tuple[type, dict[str, Any]] = (CogVideoXTransformer3DModel, {})  # that base, of the 2B's size
    trains_base = False  # the base's transformer is trained, so it is loaded in the type of trained weights

    def load(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        """Loads the base, all frozen in `weight_dtype`, and makes the module, what it trains as `trained_weights` says.

        Not in bfloat16 unasked: at a rate of 1e-5 most updates are smaller than half of its digits.
        """
        self.device, self.weight_dtype = device, weight_dtype
        self.base_dir = resolve_pipeline_directory(self.settings.pretrained_model_name_or_path)
        self.base_index = index = read_model_index(self.base_dir, expected=self.base_pipeline)
        self.check_base(self.base_dir, index, component_config(self.base_dir, "transformer", index)[1])
        self.scheduler = load_component(self.base_dir, "scheduler")
        self.alphas = noise_schedule.alphas_with_clean_end(self.scheduler, device)
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps
        self.tokenizer = load_component(self.base_dir, "tokenizer")
        # What a latent cache holds need not be encoded: VAE and text encoder would only take 10 GB of the GPU.
        is_cached = bool(self.settings.latent_cache_dir)
        self.vae = self._frozen("vae", torch.device("cpu") if is_cached else device)
        self.encoder = LatentEncoder(
            self.vae,
            self.tokenizer,
            self._frozen("text_encoder", device),
            max_sequence_length=self.settings.max_sequence_length,
            caption_dropout=self.settings.caption_dropout,
            device=device,
            dtype=weight_dtype,
        )
        if is_cached:
            self.encoder.keep_only(self.settings.validation_prompts, lambda: self._frozen("text_encoder", device))
        trained_dtype = getattr(torch, self.settings.trained_weights)
        transformer = load_component(self.base_dir, "transformer", trained_dtype if self.trains_base else weight_dtype)
        self.module = self.make_module(transformer.requires_grad_(False).to(device))
        cast_training_params(self.module, trained_dtype)

    def _frozen(self, name: str, device: torch.device) -> nn.Module:
        return load_component(self.base_dir, name, self.weight_dtype).requires_grad_(False).to(device)

    @contextmanager
    def vae_on_device(self) -> Iterator[None]:
        """For as long as a sample video takes; then the VAE goes back to where it was."""
        home = self.vae.device
        self.vae.to(self.device)
        try:
            yield
        finally:
            self.vae.to(home)

    def components(self, transformer: nn.Module) -> dict[str, Any]:
        """A pipeline's components with this transformer. No text encoder: it may be gone (see `load`), so prompts are
        encoded by `encoder`."""
        return {
            "tokenizer": self.tokenizer,
            "text_encoder": None,
            "vae": self.vae,
            "transformer": transformer,
            "scheduler": self.scheduler,
        }

    def rotary_embedding(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos, sin [F·S, head_dim] for latents [B,F,C,H,W] of models with rotary positions (5B), else None."""
        return rotary_positional_embeddings(self.plain_module.config, latents.shape, latents.device)

    def autocast(self) -> torch.autocast:
        """Products in `weight_dtype` where float32 weights meet it outside of the trainer's own autocast."""
        enabled = self.weight_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.weight_dtype if enabled else None, enabled=enabled)

    def compile(self) -> None:
        compile_blocks(self.module)

    def make_module(self, transformer: CogVideoXTransformer3DModel) -> nn.Module:
        """The trainable module made of the base's frozen transformer; `requires_grad` marks what is trained.

        Also called on the meta device, by `describe`.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, object]:
        """Derived sizes from the settings and the base's configs; no weights are read."""
        settings = self.settings
        base = Path(settings.pretrained_model_name_or_path)
        (transformer_class, config), scale = self.default_transformer, 8
        if base.is_dir():
            index = read_model_index(base, expected=self.base_pipeline)
            transformer_class, config = component_config(base, "transformer", index)
            scale = pixels_per_latent(base, index)
            self.check_base(base, index, config)
        with torch.device("meta"):
            module = self.make_module(transformer_class.from_config(config).requires_grad_(False))
        patch = module.config.patch_size * scale
        frames = {n: (n - 1) // VAE_TIME_FACTOR + 1 for n in settings.window_sizes()}
        return {
            "base": str(base) if base.is_dir() else f"{base} (not on this disk: sizes are those of CogVideoX-2B)",
            "latent frames per window": list(frames.values()),
            "video tokens per window": {
                f"{n}x{height}x{width}": f * (height // patch) * (width // patch)
                for n, f in frames.items()
                for height in settings.height_buckets
                for width in settings.width_buckets
            },
            "parameters": sum(p.numel() for p in module.parameters()),
            "trained parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }

    def check_base(self, base: Path, index: dict[str, Any], config: dict[str, Any]) -> None:
        """UserError when the base's index or its transformer's config rules these settings out."""
        recomputed_layers(config["num_layers"], self.settings.gradient_checkpointing)
        length, wanted = self.settings.max_sequence_length, config.get("max_text_seq_length", 226)
        if length != wanted and not config.get("use_rotary_positional_embeddings"):
            raise SettingError(
                "max_sequence_length", f"is {length}; the transformer of {base} takes {wanted}, no other"
            )
        timesteps = component_config(base, "scheduler", index)[1].get("num_train_timesteps", TRAIN_TIMESTEPS)
        if timesteps != TRAIN_TIMESTEPS:
            raise UserError(
                f"the scheduler of {base} has {timesteps} train timesteps; only {TRAIN_TIMESTEPS} are known"
            )

    def velocity_error(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Squared error of v, mean per frame: [B,F]. In float32: bf16 loses what small timesteps teach.

        Equal to the x0 error weighted by 1/(1−ᾱ_t), the weight CogVideoX's trainers use: x0 = √ᾱ·x − √(1−ᾱ)·v.
        """
        target = noise_schedule.velocity(latents, noise, timesteps, self.alphas)
        return (prediction.float() - target).square().mean(dim=(2, 3, 4))

    @torch.no_grad()
    def sample_clip(self, pipeline: Any, prompt: str, seed: int, **arguments: Any) -> np.ndarray:
        """A whole clip from a diffusers-like pipeline, of the first bucket's size: uint8 [N,h,w,3]."""
        settings = self.settings
        pipeline.set_progress_bar_config(disable=True)
        with self.autocast(), self.vae_on_device():
            frames = pipeline(
                prompt_embeds=self.encoder.encode_prompts([prompt]),
                negative_prompt_embeds=self.encoder.empty_prompt[None],
                num_frames=settings.frame_buckets[0],
                height=settings.height_buckets[0],
                width=settings.width_buckets[0],
                num_inference_steps=settings.validation_num_inference_steps,
                generator=torch.Generator(self.device).manual_seed(seed),
                max_sequence_length=settings.max_sequence_length,
                output_type="np",
                **arguments,
            ).frames[0]
        return to_frames(frames)
