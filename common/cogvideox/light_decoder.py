"""A small decoder that stands in for the VAE's where pictures have to be ready in real time.

It is distilled from a VAE by common.tools.distill_decoder and works on the same scaled latents. That small convolutions
with a memory of the frame before are enough was shown by TAEHV (github.com/madebyollin/taehv). Its design follows what
a GPU is fast at: dense 3×3 convolutions over single frames, channels next to each other in memory, no statistics, most
of the work at an eighth, a quarter and half of the picture's size, and the last doubling by pixel shuffle. Time enters
in one way only: some blocks also see what the block before them made of the previous frame. So

- a frame depends on a few latents of its past and on nothing later, and on them in the same way however the stream is
  cut into chunks: there is no norm over a chunk, as the VAE has, and no recurrence that could drift;
- all that a stream has to keep is the last frame of every such block's input.

The first latent of a stream makes one frame, every later one four: each of the two doublings of time makes two frames
of every one, and drops the first of all, as in the VAE's own upsampling.

Shapes: B batch, F latent frames of a chunk, N raw frames (4·(F−1)+1 of a stream's first chunk, 4·F of a later one), C
latent channels, H W latent height/width, h w pixels; within the network t frames of D channels, and frames come before
the batch in the first dimension [t·B,D,·,·]: "one frame later" is then a step of B, in memory too.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from common.cogvideox.autoencoder import latent_form
from common.cogvideox.chunk_decoder import ChunkDecoder
from common.cogvideox.pipeline_io import refuse_other_keys
from common.config.errors import UserError, one_line

TIME_FACTORS = (2, 2)  # of the first upsamplings; the others leave time as it is

RESIDUAL_GAIN = 0.1  # variance that a block adds, at first
PICTURE_DEVIATION = 0.3  # of ordinary pictures, which lie in [−1,1]

State = tuple[Tensor, ...]  # of a stream: one [B,D,·,·] a block with memory


class Block(nn.Module):
    """Two convolutions beside an identity; with `has_memory` the first sees each frame and the one before it."""

    def __init__(self, width: int, has_memory: bool):
        super().__init__()
        self.has_memory = has_memory
        self.conv1 = nn.Conv2d(2 * width if has_memory else width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """[t·B,D,·,·] and, with memory, what came before it [B,D,·,·] → [t·B,D,·,·]."""
        seen = x
        if self.has_memory:
            previous = torch.cat([before, x[: -len(before)]])
            seen = torch.cat([x, previous], dim=1)
        return x + self.conv2(functional.relu(self.conv1(seen)))


class Upsample(nn.Module):
    """A convolution that makes several channels for one, and moves them apart: twice as high and wide, and longer."""

    def __init__(self, width: int, new_width: int, time_factor: int, kernel_size: int):
        super().__init__()
        self.time_factor = time_factor
        self.conv = nn.Conv2d(width, time_factor * 4 * new_width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, batch_size: int, is_first_chunk: bool) -> Tensor:
        """[t·B,D,h,w] → [t'·B,D',2h,2w]; where time doubles t' = 2t, or 2t−1 in the first chunk."""
        frames = self.conv(x).permute(0, 2, 3, 1)  # [t·B,h,w,k·2·2·D'], k the time factor: as it lies in memory
        height, width, channels = frames.shape[1:]
        split = (self.time_factor, 2, 2, channels // (4 * self.time_factor))
        parts = frames.reshape(-1, batch_size, height, width, *split).permute(0, 4, 1, 2, 5, 3, 6, 7)
        y = parts.reshape(-1, 2 * height, 2 * width, split[-1])  # from [t,k,B,h,2,w,2,D'], so that times are in order
        y = y.permute(0, 3, 1, 2)  # in channels_last
        return y[batch_size * (self.time_factor - 1) :] if is_first_chunk else y


class LightVideoDecoder(ModelMixin, ConfigMixin):
    """Scaled latents → frames, causal, a pure function of a chunk and of the stream's state.

    Args:
        latent_channels: C.
        spatial_factor: pixels to a side of a latent: 4, 8 or 16.
        widths: channels at each resolution, from the latents' own to half of the picture's.
        layers: blocks at each resolution.
        memory_layers: how many of them, the first ones, also see the frame before; more than there are is all.
            On the mini world, in one run each, two and two were worth 0.5 dB more than one and one, and at the last
            resolution, where it costs most, it was worth nothing.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        spatial_factor: int = 8,
        widths: Sequence[int] = (512, 256, 64),
        layers: Sequence[int] = (3, 3, 3),
        memory_layers: Sequence[int] = (3, 3, 0),
    ):
        super().__init__()
        count = spatial_factor.bit_length() - 1
        if count < 2 or spatial_factor != 2**count:
            raise ValueError(f"spatial_factor {spatial_factor} is not 4, 8 or another power of two above")
        for name, value in (("widths", widths), ("layers", layers), ("memory_layers", memory_layers)):
            if len(value) != count:
                raise ValueError(
                    f"{name} {tuple(value)}: {count} numbers are needed for spatial_factor {spatial_factor}"
                )
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        last = len(widths) - 1
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(width, has_memory=i < memory) for i in range(num_blocks))
            for width, num_blocks, memory in zip(widths, layers, memory_layers, strict=True)
        )
        times = (*TIME_FACTORS, *[1] * last)
        self.upsamples = nn.ModuleList(
            # 1×1: the next resolution's blocks look around. At the end there are none.
            Upsample(width, 3 if i == last else widths[i + 1], times[i], 3 if i == last else 1)
            for i, width in enumerate(widths)
        )
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Latents of unit variance keep it through all layers; blocks begin near the identity.

        There is no norm to mend it: with PyTorch's own weights the signal is lost in the biases, and nothing is learnt.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                gain = RESIDUAL_GAIN if name.endswith("conv2") else 2.0 if name.endswith("conv1") else 1.0
                nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.upsamples[-1].conv.weight.mul_(PICTURE_DEVIATION)

    @classmethod
    def for_vae(cls, vae: AutoencoderKLCogVideoX, **sizes: Sequence[int]) -> "LightVideoDecoder":
        """An untrained one that fits a VAE's latents; `sizes` are widths, layers and memory_layers."""
        return cls(*latent_form(vae), **sizes)

    def forward(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next chunk of a stream.

        Args:
            latents: [B,F,C,H,W] as the transformer makes them, that is scaled, in the module's type.
            state: what the chunk before it returned; None begins a stream, as if its first frame had always stood.

        Returns:
            [B,N,3,h,w], about [−1,1], and the state.
        """
        batch_size, is_first = len(latents), state is None
        x = latents.transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # [F·B,C,H,W]
        x = self.conv_in(x)
        new_state: list[Tensor] = []
        for blocks, enlarge in zip(self.blocks, self.upsamples, strict=True):
            for block in blocks:
                before = None
                if block.has_memory:
                    before = x[:batch_size] if is_first else state[len(new_state)]
                    new_state.append(x[-batch_size:].clone())  # a view would keep all of x alive
                x = block(x, before)
            x = enlarge(x, batch_size, is_first)
        return x.unflatten(0, (-1, batch_size)).transpose(0, 1), tuple(new_state)


class LightStreamingDecoder(ChunkDecoder):
    """What `StreamingDecoder` is to a VAE: one stream's decoder.

    The module keeps nothing, so any number of streams can share it.

    Args:
        decoder: moved to channels_last in place, which changes no number.
    """

    def __init__(self, decoder: LightVideoDecoder):
        super().__init__(decoder.device)
        self.decoder = decoder.to(memory_format=torch.channels_last)
        self._state: State | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = self.fetch(latents).to(self.decoder.dtype)
        frames, self._state = self.decoder(latents, self._state)
        return frames


def refuse_missing(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(f"no light decoder at {directory}; python -m common.tools.distill_decoder makes one")


def load_light_decoder(
    path: str | Path, vae: AutoencoderKLCogVideoX, torch_dtype: torch.dtype | None = None
) -> LightVideoDecoder:
    """A light decoder from its directory, in eval mode and in `torch_dtype` (float32 by default).

    Raises:
        UserError: there is none, its weights are damaged, or it is made for latents of another form than the VAE's.
    """
    directory = Path(path)
    refuse_missing(directory)
    try:
        if LightVideoDecoder.load_config(directory).get("_class_name") != LightVideoDecoder.__name__:
            raise UserError(f"{directory} holds another model than a {LightVideoDecoder.__name__}")
        decoder, info = LightVideoDecoder.from_pretrained(
            directory, torch_dtype=torch_dtype or torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory} could not be loaded as a light decoder: {one_line(error)}") from error
    refuse_other_keys(directory, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    found = (decoder.config.latent_channels, decoder.config.spatial_factor)
    form = latent_form(vae)
    if found != form:
        ours, theirs = (f"{channels} channels for {factor}×{factor} pixels" for channels, factor in (found, form))
        raise UserError(f"{directory} is made for latents of {ours}; the VAE's have {theirs}")
    return decoder.eval()
