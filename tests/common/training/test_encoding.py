"""Encoding against diffusers' own VAE posterior and pipeline, and the cached form against the uncached."""

import copy

import pytest
import torch
from diffusers import CogVideoXPipeline

from common.training.encoding import LatentEncoder, encode_moments, encode_prompts, sample_posterior
from common.training.random import SampleRandom

CAPTIONS = ["A red car drives along a sandy desert road.", "A blue car rolls through snow."]


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return CogVideoXPipeline.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 9, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder_of(pipeline, caption_dropout=0.0):
    return LatentEncoder(
        pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, max_sequence_length=16,
        caption_dropout=caption_dropout, device="cpu", dtype=torch.float32,
    )  # fmt: skip


def test_moments_and_posterior_equal_diffusers(pipeline, pixels):
    moments = encode_moments(copy.deepcopy(pipeline.vae), pixels)  # of the copy: it changes classes of layers
    assert moments.shape == (2, 3, 32, 4, 6) and moments.dtype == torch.float32
    video = (pixels.float() / 255 * 2 - 1).permute(0, 2, 1, 3, 4)
    with torch.no_grad():
        posterior = pipeline.vae.encode(video).latent_dist
    noise = torch.randn(2, 3, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    ours = sample_posterior(moments, noise)
    theirs = posterior.mean + posterior.std * noise.permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 1, 3, 4), atol=1e-5, rtol=1e-5)


def test_prompt_embeddings_equal_the_pipelines(pipeline):
    ours = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, CAPTIONS, 16)
    with torch.no_grad():
        theirs, empty = pipeline.encode_prompt(CAPTIONS, ["", ""], max_sequence_length=16)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(encoder_of(pipeline).empty_prompt, empty[0], atol=1e-6, rtol=1e-6)


def test_cached_batch_encodes_to_the_same_bits(pipeline, pixels):
    common = {
        "captions": CAPTIONS,
        "sample_ids": ["a", "b"],
        "control_indices": torch.zeros(2, 3, 4, dtype=torch.int64),
    }
    moments = torch.cat([encode_moments(pipeline.vae, clip[None]) for clip in pixels])
    prompts = torch.cat([encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [c], 16) for c in CAPTIONS])
    encoder = encoder_of(pipeline, caption_dropout=0.5)
    rngs = [SampleRandom(0, 2, [0, 1]) for _ in range(2)]
    live = encoder.encode({"pixel_values": pixels, **common}, rngs[0])
    cached = encoder.encode({"latent_moments": moments, "prompt_embeds": prompts, **common}, rngs[1])
    assert torch.equal(live.latents, cached.latents) and torch.equal(live.prompt_embeds, cached.prompt_embeds)
    assert torch.equal(rngs[0].normal((2,)), rngs[1].normal((2,)))  # and leaves the generators in the same place
    assert len(live) == 2 and live.sample_ids == ["a", "b"] and live.control_indices.shape == (2, 3, 4)


def test_kept_prompts_outlive_the_text_encoder(pipeline):
    encoder = encoder_of(pipeline)
    expected, empty = encoder.encode_prompts(CAPTIONS[::-1]), encoder_of(pipeline).empty_prompt
    encoder.keep_only(CAPTIONS, reload=lambda: pipeline.text_encoder)
    assert torch.equal(encoder.encode_prompts(CAPTIONS[::-1]), expected) and torch.equal(encoder.empty_prompt, empty)
    assert encoder.text_encoder is None
    other = [CAPTIONS[0], "A caption that was changed since."]
    assert torch.equal(encoder.encode_prompts(other), encoder_of(pipeline).encode_prompts(other))
    assert encoder.text_encoder is not None


def test_scaling_factor_is_applied(pipeline):
    noise_free = torch.cat([torch.ones(1, 3, 16, 4, 6), torch.full((1, 3, 16, 4, 6), -100.0)], dim=2)
    batch = {"latent_moments": noise_free, "prompt_embeds": torch.zeros(1, 16, 24), "sample_ids": ["a"]}
    latents = encoder_of(pipeline).encode(batch, SampleRandom(0, 0, [0])).latents
    torch.testing.assert_close(latents, torch.full_like(latents, pipeline.vae.config.scaling_factor))


def test_captions_are_dropped_at_the_set_rate_and_never_in_validation(pipeline):
    samples = 400
    batch = {
        "latent_moments": torch.zeros(samples, 1, 32, 1, 1), "prompt_embeds": torch.ones(samples, 16, 24),
        "sample_ids": [str(i) for i in range(samples)],
    }  # fmt: skip
    encoder = encoder_of(pipeline, caption_dropout=0.25)
    embeds = encoder.encode(batch, SampleRandom(0, 0, range(samples))).prompt_embeds
    dropped = (embeds == encoder.empty_prompt).all(dim=(1, 2))
    assert 70 <= dropped.sum() <= 130 and (embeds[~dropped] == 1).all()
    kept = encoder.encode(batch, SampleRandom(0, 0, range(samples)), training=False).prompt_embeds
    assert (kept == 1).all()
