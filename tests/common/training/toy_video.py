"""A CogVideoX transformer of any size as objective, its latents drawn from each sample's generator: for GPUs.

Shapes: B batch · F latent frames · C latent channels · H W latent height/width · L text tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel

from common.config.settings import TrainingSettings
from common.training.ema import update_ema
from common.training.encoding import EncodedBatch
from common.training.objective import Objective


@dataclass
class VideoToySettings(TrainingSettings):
    layers: int = 4
    heads: int = 2
    latent_height: int = 8
    latent_width: int = 12
    text_dim: int = 32

    def build_objective(self):
        return VideoToyObjective(self)


class VideoToyEncoder:
    def __init__(self, settings: VideoToySettings, device: torch.device, dtype: torch.dtype):
        self.settings, self.device, self.dtype = settings, device, dtype

    def encode(self, batch, rng, training=True) -> EncodedBatch:
        s = self.settings
        clip = batch["pixel_values"].to(self.device).float().mean(dim=(1, 2, 3, 4)) / 255  # [B]
        # On the CPU and moved: the same numbers whatever the device.
        latents = torch.stack([
            torch.randn(9, 16, s.latent_height, s.latent_width, generator=torch.Generator().manual_seed(slot)) / 2
            for slot in rng.slots
        ]).to(self.device)  # fmt: skip
        text = torch.ones(len(clip), 226, s.text_dim, device=self.device, dtype=self.dtype)
        return EncodedBatch(latents + clip[:, None, None, None, None], text, None, batch["sample_ids"])


class VideoToyObjective(Objective):
    def load(self, device, weight_dtype) -> None:
        s = self.settings
        self.module = CogVideoXTransformer3DModel(
            num_attention_heads=s.heads, num_layers=s.layers, text_embed_dim=s.text_dim, sample_height=s.latent_height,
            sample_width=s.latent_width, sample_frames=33,
        ).to(device)  # fmt: skip
        self.average = None
        if s.layers < 10:
            self.average = CogVideoXTransformer3DModel.from_config(self.module.config).to(device)
            self.average.load_state_dict(self.module.state_dict())
        self.encoder = VideoToyEncoder(s, device, weight_dtype)

    def loss(self, batch, rng):
        t = rng.randint(0, 1000)  # [B]
        noise = rng.normal(batch.latents.shape[1:])
        level = (t / 1000)[:, None, None, None, None]
        predicted = self.module(
            batch.latents * (1 - level) + noise * level, batch.prompt_embeds, t.float(), return_dict=False
        )[0]
        return (predicted.float() - noise).square().mean(), {}

    def after_optimizer_step(self, step) -> None:
        if self.average is not None:
            update_ema(self.average, self.plain_module, 0.9)

    def frozen_roles(self):
        return {"average": self.average} if self.average is not None else {}

    def checkpoint_modules(self):
        return {"ema": self.average} if self.average is not None else {}

    def export(self, output_dir: Path) -> None:
        self.module.save_pretrained(output_dir / "transformer")

    def describe(self):
        return {}
