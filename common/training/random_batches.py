"""Batches as a latent cache gives them, drawn instead of read: for measuring training without videos.

Shapes: B batch · F latent frames · C latent channels · H W latent height/width · L text tokens · D text width.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from common.cogvideox.loading import pixels_per_latent
from common.cogvideox.pipeline_io import component_config, read_model_index, resolve_pipeline_directory
from common.config.settings import VAE_TIME_FACTOR, TrainingSettings
from common.data.control_signals import CONTROL_TOKENS
from common.training.accelerator import compute_dtype
from common.training.random import derive_seed

NUM_BATCHES = 4  # that are different; then they come again
LOG_VARIANCE = -6.0  # of the posterior: a VAE is sure of what it sees


def random_batches(
    settings: TrainingSettings, needs_control: bool, world_size: int = 1, rank: int = 0, start_step: int = 0
) -> Iterator[dict[str, Any]]:
    """Takes the place of `build_train_loader`: endless batches of the first bucket's size, on the current device.

    A sample is a function of the seed, the batch's number and its place in the global batch, so that two processes with
    one sample train on what one process with two does, whatever the device.

    Returns:
        Dicts of latent_moments float32 [B,F,2C,H,W], prompt_embeds [B,L,D], control_indices int64 [B,F,4], …, as
        common.data.loader describes them.
    """
    size, first = settings.train_batch_size, rank * settings.train_batch_size
    base = resolve_pipeline_directory(settings.pretrained_model_name_or_path)
    index = read_model_index(base)
    transformer, vae = (component_config(base, name, index)[1] for name in ("transformer", "vae"))
    scale = pixels_per_latent(base, index)
    frames = (settings.frame_buckets[0] - 1) // VAE_TIME_FACTOR + 1
    latent_shape = (
        frames, vae["latent_channels"], settings.height_buckets[0] // scale, settings.width_buckets[0] // scale,
    )  # fmt: skip
    text_shape = (settings.max_sequence_length, transformer["text_embed_dim"])
    made = [
        _random_batch(settings, latent_shape, vae["scaling_factor"], text_shape, number, range(first, first + size))
        for number in range(NUM_BATCHES)
    ]
    if not needs_control:
        made = [{name: value for name, value in batch.items() if name != "control_indices"} for batch in made]
    return itertools.islice(itertools.cycle(made), start_step, None)


def _random_batch(
    settings: TrainingSettings,
    latent_shape: tuple[int, int, int, int],
    scaling_factor: float,
    text_shape: tuple[int, int],
    number: int,
    slots: range,
) -> dict[str, Any]:
    """One batch, from a latent's shape [F,C,H,W] and a caption's [L,D]."""
    frames, channels, height, width = latent_shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(settings, device)

    moments = torch.full((len(slots), frames, 2 * channels, height, width), LOG_VARIANCE, device=device)
    text = torch.empty((len(slots), *text_shape), device=device, dtype=dtype)
    control = torch.empty((len(slots), frames, VAE_TIME_FACTOR), dtype=torch.int64)
    for row, slot in enumerate(slots):
        generator = torch.Generator().manual_seed(derive_seed("random batch", settings.seed, number, slot))
        mean = torch.randn(latent_shape, generator=generator)
        moments[row, :, :channels] = mean.to(device) / scaling_factor  # latents of variance 1
        text[row] = torch.randn(text_shape, generator=generator).to(device, dtype)
        control[row] = torch.randint(0, len(CONTROL_TOKENS), (frames, 1), generator=generator)  # held for 4 raw frames
    return {
        "latent_moments": moments,
        "prompt_embeds": text,
        "captions": [""] * len(slots),
        "sample_ids": [f"random {number}.{slot}" for slot in slots],
        "slots": torch.arange(slots.start, slots.stop),
        "control_indices": control.to(device),
    }
