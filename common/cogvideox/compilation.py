"""Compiling, block by block and layer by layer: most are alike, so it is minutes sooner ready than in one piece.

What was compiled is kept on disk by PyTorch, so that the next start of the same model on the same machine is quick.
"""

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from common.cogvideox.autoencoder import make_streamable
from common.cogvideox.transformer import all_blocks

MAX_COMPILED_KINDS = 64  # of calls of a block
# Normalisation, activation and the frames kept from the last chunk in one pass over memory: beyond these counts the
# compiler would store what it has so far.
ONE_PASS = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 100}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def compile_blocks(transformer: nn.Module) -> None:
    """Compiles each block by itself: they are alike, so one is compiled and the others reuse it.

    Once for every kind of call: window length, dtype, with or without gradient, training or validation batch; that may
    be more often than torch allows unasked.
    """
    _allow_many_kinds()
    for block in all_blocks(transformer):
        block.compile(fullgraph=True, dynamic=False)


def compile_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Compiles a VAE's decoder for streaming, layer by layer: most are alike.

    Once for a stream's first chunk, which has no cache, and once for all others (twice for odd W, whose last latent is
    decoded alone).

    On a GPU weights get channels last, as its convolutions want them; what goes in has to have the same form, which
    `StreamingDecoder` sees to. And cuDNN tries its algorithms out, for this process as a whole.
    """
    make_streamable(vae)
    _allow_many_kinds()
    decoder = vae.decoder
    if vae.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the default choice of algorithm is slower
        for parameter in decoder.parameters():
            if parameter.ndim in CHANNELS_LAST:
                parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
    for block in (decoder.mid_block, *decoder.up_blocks):
        for layer in (*block.resnets, *(getattr(block, "upsamplers", None) or ())):
            layer.compile(fullgraph=True, dynamic=False, options=ONE_PASS)
    for layer in (decoder.norm_out, decoder.conv_out):
        layer.compile(fullgraph=True, dynamic=False, options=ONE_PASS)


def _allow_many_kinds() -> None:
    """Of calls of one compiled function, each compiled for itself: more than torch allows unasked."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_KINDS)
