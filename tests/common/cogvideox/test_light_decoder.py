"""The light decoder: the chunking never shows, nothing looks ahead, and it compiles, trains, saves and loads."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from common.cogvideox.autoencoder import StreamingDecoder
from common.cogvideox.chunk_decoder import to_uint8
from common.cogvideox.light_decoder import LightStreamingDecoder, LightVideoDecoder, load_light_decoder
from common.config.errors import UserError

TINY = {"widths": (16, 12, 8), "layers": (2, 1, 2), "memory_layers": (2, 1, 1)}


def make_decoder(seed=0, **config):
    torch.manual_seed(seed)
    return LightVideoDecoder(**{"latent_channels": 4, "spatial_factor": 8, **TINY, **config}).eval()


def make_vae(block_out_channels=(8, 8, 8, 8)):
    return AutoencoderKLCogVideoX(
        block_out_channels=block_out_channels, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * len(block_out_channels), scaling_factor=0.7,
        up_block_types=("CogVideoXUpBlock3D",) * len(block_out_channels),
    ).eval()  # fmt: skip


def latents(num_frames, seed=0, batch=1):
    return torch.randn(batch, num_frames, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def chunkings(total):
    """Every way to cut `total` latents into chunks."""
    for cuts in itertools.product((False, True), repeat=total - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), total]
        yield [b - a for a, b in itertools.pairwise(places)]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_every_chunking_equals_decoding_at_once(batch):
    decoder, z = make_decoder().double(), latents(6, batch=batch).double()
    whole, _ = decoder(z)
    assert whole.shape == (batch, 21, 3, 16, 24)
    for sizes in chunkings(6):
        state, frames = None, []
        for chunk in z.split(sizes, dim=1):
            decoded, state = decoder(chunk, state)
            frames.append(decoded)
        torch.testing.assert_close(torch.cat(frames, dim=1), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_streams_of_a_batch_do_not_see_each_other():
    decoder, z = make_decoder().double(), latents(3, batch=3).double()
    together, _ = decoder(z)
    for i in range(3):
        torch.testing.assert_close(decoder(z[i : i + 1])[0][0], together[i], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_later_latent_never_changes_an_earlier_frame_and_an_earlier_one_is_remembered():
    decoder, z = make_decoder().double(), latents(5).double()
    whole, _ = decoder(z)
    changed = z.clone()
    changed[:, 2] += 1
    other, _ = decoder(changed)
    differs = (other - whole).abs().amax(dim=(0, 2, 3, 4)) > 0  # [N]
    assert not differs[:5].any()  # the frames of latents 0 and 1
    assert differs[5:13].all()  # those of latent 2, and of latent 3, which only has_memory it


@torch.no_grad()
@pytest.mark.parametrize("factor", [4, 8, 16])
def test_one_frame_for_the_first_latent_and_four_for_every_other(factor):
    count = {4: 2, 8: 3, 16: 4}[factor]
    decoder = make_decoder(spatial_factor=factor, widths=(8,) * count, layers=(1,) * count, memory_layers=(1,) * count)
    frames, state = decoder(latents(1))
    assert frames.shape == (1, 1, 3, 2 * factor, 3 * factor)
    frames, state = decoder(latents(2), state)
    assert frames.shape == (1, 8, 3, 2 * factor, 3 * factor)
    assert decoder(latents(3))[0].shape[1] == 9


def test_frames_are_in_order_and_pixels_in_place():
    """Of a convolution whose output says where each channel belongs."""
    decoder = make_decoder(widths=(4, 4, 4), layers=(1, 1, 1))
    enlarge = decoder.upsamples[0]  # 4 channels → 2 times, 2 rows, 2 columns of 4
    with torch.no_grad():
        enlarge.conv.weight.zero_()
        enlarge.conv.bias.copy_(torch.arange(32.0))
    y = enlarge(torch.zeros(2 * 3, 4, 5, 6), batch_size=3, is_first_chunk=False)  # two frames of three streams
    assert y.shape == (4 * 3, 4, 10, 12)
    for time, row, column, channel in itertools.product(range(4), range(2), range(2), range(4)):
        expected = 16 * (time % 2) + 8 * row + 4 * column + channel
        assert (y[3 * time : 3 * time + 3, channel, row::2, column::2] == expected).all()
    assert enlarge(torch.zeros(6, 4, 5, 6), batch_size=3, is_first_chunk=True).shape[0] == 3 * 3


@torch.no_grad()
def test_as_a_streams_decoder_it_gives_what_the_vae_gives():
    """Same shapes and types for the same calls, and a state that is neither shared nor a view of a whole chunk."""
    vae, decoder, z = make_vae(), make_decoder(), latents(5, batch=2)
    light, other, full = LightStreamingDecoder(decoder), LightStreamingDecoder(decoder), StreamingDecoder(vae)
    for chunk in z.split([1, 2, 2], dim=1):
        ours, theirs = light.decode(chunk), full.decode(chunk)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) == (theirs.shape, torch.float32)
    assert all(s.untyped_storage().nbytes() == s.numel() * s.element_size() for s in light._state)
    torch.testing.assert_close(other.decode(z[:, :1]), decoder(z[:, :1])[0])  # begins anew
    levels = LightStreamingDecoder(decoder).decode_uint8(z[:1])
    assert levels.shape == (17, 16, 24, 3)
    np.testing.assert_array_equal(levels, to_uint8(decoder(z[:1])[0])[0])


@torch.no_grad()
def test_channels_stay_next_to_each_other_in_memory():
    decoder = make_decoder().to(memory_format=torch.channels_last)
    state, seen = decoder(latents(1, batch=2))[1], []
    for module in decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    decoder(latents(2, batch=2), state)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@torch.no_grad()
def test_compiles_in_one_piece():
    decoder, z = make_decoder(spatial_factor=4, widths=(8, 8), layers=(1, 1), memory_layers=(1, 0)), latents(3)
    state = torch.compile(decoder, fullgraph=True, backend="eager")(z[:, :1])[1]
    frames, _ = torch.compile(decoder, fullgraph=True, dynamic=False)(z[:, 1:], state)
    torch.testing.assert_close(frames, decoder(z)[0][:, 1:], rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_parameter():
    decoder = make_decoder()
    frames, _ = decoder(latents(3))
    frames.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    decoder, vae = make_decoder(), make_vae()
    decoder.save_pretrained(tmp_path)
    loaded = load_light_decoder(tmp_path, vae)
    assert not loaded.training and dict(loaded.config)["widths"] == [16, 12, 8]
    assert torch.equal(loaded(latents(3))[0], decoder(latents(3))[0])
    assert load_light_decoder(tmp_path, vae, torch.bfloat16).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"widths \(8, 8\): 3 numbers are needed for spatial_factor 8"):
        make_decoder(widths=(8, 8))
    for factor in (2, 6):
        with pytest.raises(ValueError, match=f"spatial_factor {factor} is not 4, 8 or"):
            make_decoder(spatial_factor=factor)
    vae = make_vae()
    with pytest.raises(UserError, match="no light decoder at .*distill_decoder makes one"):
        load_light_decoder(tmp_path, vae)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="holds another model"):
        load_light_decoder(tmp_path / "vae", vae)
    LightVideoDecoder.for_vae(vae, **TINY).save_pretrained(tmp_path / "light")
    coarser = make_vae((8, 8, 8))
    with pytest.raises(UserError, match="of 4 channels for 8×8 pixels; the VAE's have 4 channels for 4×4 pixels"):
        load_light_decoder(tmp_path / "light", coarser)
    weights = tmp_path / "light" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be loaded as a light decoder"):
        load_light_decoder(tmp_path / "light", vae)
