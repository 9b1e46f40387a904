"""The published CogVideoX-2B and 5B as configs, and a mini one: what `common.tools.make_model` builds.

Values are those of the configs in THUDM/CogVideoX-2b and -5b (transformer, vae, scheduler) and of google/t5-v1_1-xxl,
whose encoder both models have; what is not named has diffusers' default, which is theirs too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from transformers import T5Config

TRANSFORMER_2B = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": False,
}

VAE_2B = {
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 3,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
}

T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}


@dataclass(frozen=True)
class ModelSize:
    """Constructor arguments of one model's parts; `dtype` is that of its published weights.

    `control_dim` and `first_control_layer` (None: half of the layers, as published) are those that stage 2 adds.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    snr_shift_scale: float
    dtype: torch.dtype
    control_dim: int = 768
    first_control_layer: int | None = None

    def with_layers(self, num_layers: int) -> "ModelSize":
        """The same width, another depth."""
        return replace(self, transformer={**self.transformer, "num_layers": num_layers})

    def with_small_text_encoder(self) -> "ModelSize":
        """Two narrow T5 layers, as wide outside as the transformer wants; the vocabulary is the tokenizer's own."""
        small = {"d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 0}
        return replace(self, text_encoder={**small, "d_model": self.transformer["text_embed_dim"]})

    def control_config(self) -> dict[str, Any]:
        """What stage 2 adds to the transformer's arguments."""
        num_layers, first = self.transformer["num_layers"], self.first_control_layer
        return {
            "control_dim": self.control_dim,
            "control_start_layer": num_layers // 2 if first is None else first,
            "control_end_layer": num_layers,
            "control_attention": "frame_causal",
            "control_temporal_position": True,
        }

    def t5_config(self, tokenizer_size: int) -> T5Config:
        """T5 v1.1; a `vocab_size` of 0 becomes the tokenizer's, rounded up to a multiple of 64."""
        vocabulary = self.text_encoder["vocab_size"] or -(-tokenizer_size // 64) * 64
        more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1}
        return T5Config(**{**self.text_encoder, **more, "vocab_size": vocabulary}, architectures=["T5EncoderModel"])

    def scheduler(self) -> CogVideoXDDIMScheduler:
        """The published schedule: zero terminal signal, v-prediction."""
        return CogVideoXDDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=self.snr_shift_scale,
        )


_2B = ModelSize(TRANSFORMER_2B, VAE_2B, T5_XXL, snr_shift_scale=3.0, dtype=torch.float16)

SIZES = {
    "2b": _2B,
    "5b": ModelSize(
        {**TRANSFORMER_2B, "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        {**VAE_2B, "scaling_factor": 0.7},
        T5_XXL,
        snr_shift_scale=1.0,
        dtype=torch.bfloat16,
    ),
    # As large as data/miniworld's base model, for 64×96 pixels and 33 frames. make_base takes transformer and schedule
    # from here, but for what its options set; its VAE and text encoder are base_vae's and base_text's own.
    "mini": ModelSize(
        {
            **TRANSFORMER_2B,
            "num_attention_heads": 3,
            "time_embed_dim": 32,  # a block's modulation is six vectors that vary smoothly with the noise level
            "text_embed_dim": 128,
            "num_layers": 6,
            "patch_size": 1,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 33,
            "max_text_seq_length": 64,
            "spatial_interpolation_scale": 1.0,
        },
        {
            **VAE_2B,
            "block_out_channels": (16, 32, 32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_height": 64,
            "sample_width": 96,
        },
        {},
        snr_shift_scale=3.0,
        dtype=torch.float32,
        control_dim=64,
        first_control_layer=0,
    ).with_small_text_encoder(),
}
