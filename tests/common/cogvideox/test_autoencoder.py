"""Streaming decode against diffusers' own decode, for chunks of every size; faster layers against diffusers' own."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from common.cogvideox.autoencoder import StreamingDecoder, encode_frames, make_streamable, use_fast_layers
from common.cogvideox.autoencoder_layers import CogVideoXTwoPassGroupNorm
from common.cogvideox.chunk_decoder import to_uint8


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


def assert_equal_but_for_rounding(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


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
    assert_equal_but_for_rounding(streamed, expected)
    assert expected.shape[1] == 4 * (num_frames - 1) + 1


def test_the_vae_itself_still_decodes_as_diffusers_where_that_is_right():
    streamable, z = make_streamable(make_vae()), latents(9)
    with torch.no_grad():
        ours = streamable.decode(z.transpose(1, 2) / 0.7).sample.transpose(1, 2)
    assert_equal_but_for_rounding(ours, diffusers_decode(make_vae(), z))


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


MINI_WORLD = [  # block_out_channels, latent height and width: 64×96 pixels at 8×8 and at 4×4 pixels a latent
    ((16, 32, 32, 64), (8, 12)),
    ((16, 32, 64), (16, 24)),
]


def make_mini_vae(channels):
    kinds = {"down_block_types": ("CogVideoXDownBlock3D",), "up_block_types": ("CogVideoXUpBlock3D",)}
    kinds = {key: kind * len(channels) for key, kind in kinds.items()}
    return make_vae(block_out_channels=channels, latent_channels=16, norm_num_groups=8, **kinds)


@torch.no_grad()
def diffusers_chunks(vae, chunks):
    """What diffusers' own decoder makes of chunks [B,C,F,H,W] one after another."""
    cache, frames = None, []
    for chunk in chunks:
        decoded, cache = vae.decoder(chunk, conv_cache=cache)
        frames.append(decoded)
    return torch.cat(frames, dim=2)


@pytest.mark.parametrize("channels, size", MINI_WORLD)
def test_faster_layers_decode_and_encode_as_diffusers(channels, size):
    plain = make_mini_vae(channels)
    fast = make_streamable(copy.deepcopy(plain))
    z = torch.randn(1, 9, 16, *size, generator=torch.Generator().manual_seed(0))
    chunks = z.split((3, 2, 2, 2), dim=1)  # the first without a cache, the others with a warm one
    decoder = StreamingDecoder(fast)
    frames = torch.cat([decoder.decode(chunk) for chunk in chunks], dim=1)
    theirs = diffusers_chunks(plain, [chunk.transpose(1, 2) / 0.7 for chunk in chunks]).transpose(1, 2)
    assert_equal_but_for_rounding(frames, theirs)

    levels = to_uint8(frames).movedim(-1, -3)
    with torch.no_grad():
        mean = plain.encode(levels.transpose(1, 2) / 127.5 - 1).latent_dist.mean
    assert_equal_but_for_rounding(encode_frames(fast, levels), mean.transpose(1, 2) * 0.7)


def test_group_norm_is_exact_with_channels_last_and_a_large_mean():
    x = torch.randn(1, 8, 4, 32, 48, generator=torch.Generator().manual_seed(0)) + 30
    expected = torch.nn.functional.group_norm(x.double(), 4).float()
    ours = CogVideoXTwoPassGroupNorm(4, 8)(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # PyTorch's own is off by 3e-3


def test_faster_layers_have_diffusers_gradients():
    plain = make_vae()
    fast = make_streamable(copy.deepcopy(plain))
    z = latents(3).transpose(1, 2)
    for vae in (plain, fast):
        vae.decoder(z)[0].square().mean().backward()
    for (name, ours), theirs in zip(fast.decoder.named_parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_faster_layers_compile_without_a_graph_break(vae):
    chunk, decoder = latents(2).transpose(1, 2), copy.deepcopy(make_streamable(vae)).decoder
    with torch.no_grad():
        expected, cache = decoder(chunk)
        compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
        assert_equal_but_for_rounding(compiled(chunk)[0], expected)
        assert_equal_but_for_rounding(compiled(chunk, conv_cache=cache)[0], decoder(chunk, conv_cache=cache)[0])


def test_using_fast_layers_twice_changes_nothing_more():
    vae = use_fast_layers(make_vae())
    kinds = [type(module) for module in vae.modules()]
    assert kinds == [type(module) for module in use_fast_layers(vae).modules()] and type(vae) is AutoencoderKLCogVideoX
