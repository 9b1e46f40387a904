"""Rotary positions of CogVideoX-5B for any latent size, without a pipeline at hand.

Shapes: F latent frames · H W latent height/width · S tokens per latent frame.
"""

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid


def rotary_positional_embeddings(
    config: Any, latent_shape: torch.Size, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin [F·S, head_dim] for latents [B,F,C,H,W], as diffusers' CogVideoX pipelines make them; None where
    the model's config has no rotary positions (2B)."""
    if not config.use_rotary_positional_embeddings:
        return None
    _, num_frames, _, height, width = latent_shape
    grid = (height // config.patch_size, width // config.patch_size)
    crop = get_resize_crop_region_for_grid(
        grid, config.sample_width // config.patch_size, config.sample_height // config.patch_size
    )
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, crops_coords=crop, grid_size=grid, temporal_size=num_frames, device=device
    )
