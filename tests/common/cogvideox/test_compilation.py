"""The VAE's decoder as it is compiled, against diffusers' own. Traced as for a GPU, run by PyTorch's eager backend:
making C++ of it would take minutes."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from common.cogvideox.autoencoder import StreamingDecoder, match_memory_format, use_fast_layers
from common.cogvideox.autoencoder_layers import CogVideoXTwoPassGroupNorm
from common.cogvideox.compilation import CHANNELS_LAST, compile_decoder


def make_vae():
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_height=16, sample_width=24, scaling_factor=0.7,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@torch.no_grad()
def test_a_compiled_decoder_equals_diffusers_and_compiles_for_two_kinds_of_chunk(traced, channels_last):
    plain, vae = make_vae(), make_vae()
    compile_decoder(vae)
    for parameter in vae.decoder.parameters() if channels_last else ():  # as on a GPU
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
    chunks = [torch.randn(1, n, 4, 2, 3, generator=torch.Generator().manual_seed(n)) for n in (3, 2, 2, 2)]
    decoder, cache = StreamingDecoder(vae), None
    for number, z in enumerate(chunks):
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            ours = decoder.decode(z)
        theirs, cache = plain.decoder(z.transpose(1, 2) / 0.7, conv_cache=cache)
        theirs = theirs.transpose(1, 2)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    with torch.compiler.set_stance("fail_on_recompile"):  # a further stream compiles nothing
        again = StreamingDecoder(vae)
        assert torch.equal(again.decode(chunks[0]), StreamingDecoder(vae).decode(chunks[0]))
        again.decode(chunks[1])


def test_what_goes_into_a_decoder_and_what_it_keeps_lie_as_its_weights_do():
    """Or a GPU would turn every tensor round at every layer, and compile anew for every chunk."""
    vae, z = make_vae(), torch.randn(1, 4, 2, 6, 8)
    assert match_memory_format(z, vae.decoder).is_contiguous()
    for parameter in vae.decoder.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
    last = match_memory_format(z, vae.decoder)
    assert last.stride()[1] == 1 and torch.equal(last, z)
    conv = use_fast_layers(vae).decoder.conv_in
    _, kept = conv(last)
    # Nothing of the larger tensor that it is a part of shows, not even in the stride of a batch of one.
    assert kept.stride() == torch.empty_like(kept, memory_format=torch.channels_last_3d).stride()


def test_norms_from_sums_by_channel_are_exact_where_corners_are_unlike_the_rest():
    x = torch.randn(1, 8, 2, 20, 30, generator=torch.Generator().manual_seed(0))
    x[:, :, :, ::19, ::29] += 1000
    x[:, 3] = 7
    x[:, 3, 0, 0, 0] = 900
    norm = CogVideoXTwoPassGroupNorm(4, 8, eps=1e-6)
    gain, offset = (part.double()[:, :, None, None, None] for part in norm.gain_and_offset(x))
    exact = torch.nn.functional.group_norm(x.double(), 4, eps=1e-6)
    assert (x.double() * gain + offset - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("mean", [0.0, 30.0, -3000.0])
def test_norms_from_sums_by_channel_are_exact_also_where_the_mean_is_large(mean):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 20, 30, generator=generator) * torch.logspace(-1, 1, 8)[:, None, None, None] + mean
    norm = CogVideoXTwoPassGroupNorm(4, 8, eps=1e-6)
    norm.weight.data.normal_(generator=generator)
    norm.bias.data.normal_(generator=generator)
    gain, offset = (part.double()[:, :, None, None, None] for part in norm.gain_and_offset(x))
    exact = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    # float32 holds a mean of 3000 to 2e-4, of which the offset is a multiple.
    assert (x.double() * gain + offset - exact).abs().max() < 2e-5 + 1e-6 * abs(mean)
