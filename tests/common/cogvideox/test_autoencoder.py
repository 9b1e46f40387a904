"""Streaming decode against diffusers' own decode, for chunks of every size."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from common.cogvideox.autoencoder import StreamingDecoder, make_streamable, to_uint8


def make_vae(seed=0, **config):
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
        "sample_height": 16, "sample_width": 24, "scaling_factor": 0.7,
    }  # fmt: skip
    return AutoencoderKLCogVideoX(**{**settings, **config}).eval()


@pytest.fixture(scope="module")
def vae():
    return make_vae()


def latents(num_frames, seed=0, batch=1):
    return torch.randn(batch, num_frames, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def diffusers_decode(vae, z):
    plain = make_vae()
    plain.load_state_dict(vae.state_dict())
    return plain.decode(z.transpose(1, 2) / 0.7).sample.transpose(1, 2)


@pytest.mark.parametrize("num_frames", [1, 3, 5, 9])
def test_chunked_as_diffusers_chunks_it_equals_diffusers(vae, num_frames):
    z = latents(num_frames)
    expected = diffusers_decode(vae, z)
    decoder = StreamingDecoder(vae)
    first = min(num_frames, 3)
    chunks = [z[:, :first], *z[:, first:].split(2, dim=1)] if num_frames > 3 else [z]
    streamed = torch.cat([decoder.decode(chunk) for chunk in chunks], dim=1)
    assert torch.equal(streamed, expected) and expected.shape[1] == 4 * (num_frames - 1) + 1


def test_the_vae_itself_still_decodes_as_diffusers_where_that_is_right():
    streamable, z = make_streamable(make_vae()), latents(9)
    with torch.no_grad():
        ours = streamable.decode(z.transpose(1, 2) / 0.7).sample.transpose(1, 2)
    assert torch.equal(ours, diffusers_decode(make_vae(), z))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2), (2, 1, 3), (3, 2, 1), (4, 4), (5, 1, 2)])
def test_every_chunk_size_gives_four_frames_a_latent_and_one_for_the_first(vae, sizes):
    decoder, z = StreamingDecoder(vae), latents(sum(sizes))
    counts = [decoder.decode(chunk).shape[1] for chunk in z.split(sizes, dim=1)]
    assert counts == [4 * sizes[0] - 3] + [4 * size for size in sizes[1:]]


@pytest.mark.parametrize("sizes", [(3, 2, 2), (1, 1, 1, 1, 1, 1, 1), (2, 1, 4)])
def test_chunking_does_not_show_but_for_the_norms_statistics(sizes):
    """With GroupNorm taken out, which alone looks at a whole chunk, every chunking gives the same video."""
    vae = make_vae()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x * 0.5
    z = latents(sum(sizes))
    whole = StreamingDecoder(vae).decode(z)
    decoder = StreamingDecoder(vae)
    streamed = torch.cat([decoder.decode(chunk) for chunk in z.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-5)


def test_interleaved_streams_do_not_disturb_each_other_and_a_new_one_starts_fresh(vae):
    chunks = {name: latents(7, seed).split((3, 2, 2), dim=1) for seed, name in enumerate("ab")}

    def alone(name):
        decoder = StreamingDecoder(vae)
        return torch.cat([decoder.decode(chunk) for chunk in chunks[name]], dim=1)

    decoders, mixed = {name: StreamingDecoder(vae) for name in "ab"}, {"a": [], "b": []}
    for i in range(3):
        for name in "ab":
            mixed[name].append(decoders[name].decode(chunks[name][i]))
    for name in "ab":
        assert torch.equal(torch.cat(mixed[name], dim=1), alone(name))
    continued = torch.cat([decoders["a"].decode(chunk) for chunk in chunks["b"]], dim=1)
    assert not torch.equal(continued[:, : alone("b").shape[1]], alone("b"))  # the cache does matter


def test_a_batch_decodes_as_its_members(vae):
    z = latents(5, batch=2)
    both, single = StreamingDecoder(vae), StreamingDecoder(vae)
    for chunk in z.split((3, 2), dim=1):
        torch.testing.assert_close(both.decode(chunk)[1:], single.decode(chunk[1:]), rtol=0, atol=1e-4)


def test_a_streamable_vae_is_saved_as_diffusers_own(tmp_path):
    vae = make_streamable(make_vae())
    keys = list(vae.state_dict())
    vae.save_pretrained(tmp_path)
    again = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert list(again.state_dict()) == keys == list(make_vae().state_dict())
    assert torch.equal(StreamingDecoder(again).decode(latents(4)), StreamingDecoder(vae).decode(latents(4)))


def test_bfloat16_vae_takes_float32_latents():
    decoder = StreamingDecoder(make_vae().to(torch.bfloat16))
    frames = [decoder.decode_uint8(latents(1)), decoder.decode_uint8(latents(2, 1))]
    assert [f.shape for f in frames] == [(1, 16, 24, 3), (8, 16, 24, 3)] and frames[0].dtype == "uint8"


def test_pixel_levels():
    frames = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(1, 5, 1, 1, 1).expand(1, 5, 3, 1, 1)
    assert to_uint8(frames)[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_cache_does_not_grow(vae):
    def size(cache):
        if isinstance(cache, dict):
            return sum(size(value) for value in cache.values())
        return 0 if cache is None else cache.numel()

    decoder, sizes = StreamingDecoder(vae), []
    for i in range(4):
        decoder.decode(latents(2, i))
        sizes.append(size(decoder._conv_cache))
    assert sizes[0] > 0 and len(set(sizes)) == 1
