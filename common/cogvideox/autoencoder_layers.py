"""Layers of diffusers' VAE that compute the same with less: parameters and results are the replaced classes' own.

Shapes: B batch, C latent channels, D a layer's channels, F latent frames, H W latent height/width, t h w the same of a
layer's input (h = r·H and w = r·W for a whole number r).
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn
from torch.nn import functional

HAS_ONEDNN = torch.backends.mkldnn.is_available()  # not for every processor


class CogVideoXOneDNNConv3d(CogVideoXSafeConv3d):
    """`CogVideoXSafeConv3d` that asks for oneDNN on the CPU.

    For one clip of few channels PyTorch takes another kernel (ConvParams::use_mkldnn wants a batch of 16 or
    B·D·t·h > 20480), which needs four to twelve times as long. In bfloat16 it takes oneDNN by itself. Channels lie next
    to each other in memory, which oneDNN likes best: the first convolution turns its input so, other layers keep it.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_slow = input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        if not is_slow or not HAS_ONEDNN or torch.compiler.is_compiling():  # torch.compile cannot trace the call
            return super().forward(input)
        input = input.contiguous(memory_format=torch.channels_last_3d)
        return torch.mkldnn_convolution(
            input, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


class CogVideoXContiguousCacheCausalConv3d(CogVideoXCausalConv3d):
    """`CogVideoXCausalConv3d` whose cache always lies in memory in the same way: what was compiled for one chunk fits
    the next."""

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.pad_mode == "replicate" or self.time_kernel_size == 1:
            return super().forward(inputs, conv_cache)
        inputs = self.fake_context_parallel_forward(inputs, conv_cache)
        is_last = inputs.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if is_last else torch.contiguous_format
        return self.conv(inputs), inputs[:, :, 1 - self.time_kernel_size :].clone(memory_format=layout)


class CogVideoXTwoPassGroupNorm(nn.GroupNorm):
    """`GroupNorm` that stays exact when channels lie next to each other in memory.

    There PyTorch's CPU kernel takes the variance as E[x²] − E[x]² and sums it up in one float32 a channel and thread,
    which is off by 3e-3 where the mean is thirty deviations, and by 3e-5 in videos of a trained VAE.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or input.is_contiguous():
            return super().forward(input)
        centred = input - self._group_mean(input.mean(dim=(2, 3, 4)))[:, :, None, None, None]
        variance = self._group_mean(centred.square().mean(dim=(2, 3, 4)))
        gain = (variance + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias[:, None, None, None], centred, gain[:, :, None, None, None])

    def gain_and_offset(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B,D] each: the normed input is input · gain + offset.

        From sums by channel in one pass over memory, of differences from one pixel of the channel, or the square of a
        large mean would swallow the variance. The compiler makes more of this than of group_norm.
        """
        pivot = input[
            :, :, 0, input.shape[3] // 2, input.shape[4] // 2
        ].float()  # [B,D]; corners are like no other pixel
        shifted = input.float() - pivot[:, :, None, None, None]
        mean, square = shifted.mean(dim=(2, 3, 4)), shifted.square().mean(dim=(2, 3, 4))
        group_mean = self._group_mean(mean + pivot)
        variance = self._group_mean(square - mean.square() + (mean + pivot - group_mean).square())
        gain = (variance.clamp_min(0) + self.eps).rsqrt() * self.weight.float()
        return gain, self.bias.float() - group_mean * gain

    def _group_mean(self, means: Tensor) -> Tensor:
        """[B,D] of single channels → [B,D]: for every channel the mean over its group."""
        groups = means.unflatten(1, (self.num_groups, -1))  # [B,groups,D/groups]
        return groups.mean(dim=2, keepdim=True).expand_as(groups).flatten(1)


class CogVideoXLowResolutionSpatialNorm3D(CogVideoXSpatialNorm3D):
    """`CogVideoXSpatialNorm3D` whose 1×1×1 convolutions see the latent before it is enlarged, not after.

    Nearest-neighbour enlarging repeats numbers, and a convolution of one pixel makes equals of equals; so the order
    does not matter but for r²·t/F times the work and two tensors of the layer's full size. diffusers also hands these
    convolutions' inputs on to the next chunk, which never reads them; here the cache is empty.
    """

    def forward(
        self, f: Tensor, zq: Tensor, conv_cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[B,D,t,h,w], [B,C,F,H,W] → [B,D,t,h,w], {}."""
        if torch.compiler.is_compiling():
            return self._in_one_product(f, zq), {}
        scale, shift = (_repeat_frames(conv.conv(zq), f.shape[2]) for conv in (self.conv_y, self.conv_b))
        normed = self.norm_layer(f)
        tiles = normed.unflatten(4, (zq.shape[4], -1)).unflatten(3, (zq.shape[3], -1))  # a view [B,D,t,H,r,W,r]
        tiles.mul_(scale[:, :, :, :, None, :, None]).add_(shift[:, :, :, :, None, :, None])
        return normed, {}

    def _in_one_product(self, f: Tensor, zq: Tensor) -> Tensor:
        """The same with norm and modulation as one factor and one summand a low-resolution pixel, which a small product
        makes; what is left for the layer's full size is one multiplication and one sum, and the activation after it."""
        gain, offset = (part[:, :, None] for part in self.norm_layer.gain_and_offset(f))  # [B,D,1]
        scale, shift = (self._weights(conv.conv) for conv in (self.conv_y, self.conv_b))  # [D,C+1]
        weights = torch.cat([scale * gain, scale * offset + shift], dim=1)  # [B,2·D,C+1]
        z = _repeat_frames(zq, f.shape[2]).float()
        z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1).flatten(2)  # [B,C+1,t·H·W]
        product = torch.bmm(z.transpose(1, 2), weights.transpose(1, 2))  # [B,t·H·W,2·D]
        product = product.unflatten(1, (f.shape[2], *zq.shape[3:])).permute(0, 4, 1, 2, 3)  # [B,2·D,t,H,W]
        factor, summand = product[:, :, :, :, None, :, None].chunk(2, dim=1)
        tiles = f.unflatten(4, (zq.shape[4], -1)).unflatten(3, (zq.shape[3], -1))  # a view [B,D,t,H,r,W,r]
        return (tiles * factor + summand).flatten(5, 6).flatten(3, 4).to(f.dtype)

    @staticmethod
    def _weights(conv: nn.Conv3d) -> Tensor:
        """Of a convolution of one pixel, with the bias as a last column, float32 [D,C+1]."""
        return torch.cat([conv.weight.flatten(1), conv.bias[:, None]], dim=1).float()


def _repeat_frames(z: Tensor, num_frames: int) -> Tensor:
    """[B,D,F,H,W] → [B,D,t,H,W]; of an odd number of frames the first is the video's first, alone in its latent."""
    single = 1 if num_frames > 1 and num_frames % 2 else 0
    rest = functional.interpolate(z[:, :, single:], size=(num_frames - single, *z.shape[3:]))
    return torch.cat([z[:, :, :single], rest], dim=2) if single else rest


class CogVideoXStreamingUpsample3D(CogVideoXUpsample3D):
    """`CogVideoXUpsample3D` that is told whether its input begins the video; its convolution, which sees one frame at
    a time, comes before frames are doubled and not after."""

    def forward(self, inputs: Tensor, is_first_chunk: bool = True) -> Tensor:
        """[B,D,t,h,w] → [B,D,t',2h,2w]; where time is compressed t' = 2t, or 2t−1 in the first chunk."""
        frames = inputs.transpose(1, 2)  # [B,t,D,h,w]
        enlarged = functional.interpolate(frames.flatten(0, 1), scale_factor=2.0)
        upsampled = self.conv(enlarged).unflatten(0, frames.shape[:2]).transpose(1, 2)  # [B,D,t,2h,2w]
        num_single = 1 if is_first_chunk else 0  # leading frames that are not doubled in time
        if not self.compress_time or upsampled.shape[2] == num_single:
            return upsampled
        doubled = functional.interpolate(upsampled[:, :, num_single:], scale_factor=(2.0, 1.0, 1.0))
        return torch.cat([upsampled[:, :, :num_single], doubled], dim=2) if num_single else doubled


FASTER_CLASSES = {
    CogVideoXCausalConv3d: CogVideoXContiguousCacheCausalConv3d,
    CogVideoXSafeConv3d: CogVideoXOneDNNConv3d,
    nn.GroupNorm: CogVideoXTwoPassGroupNorm,
    CogVideoXSpatialNorm3D: CogVideoXLowResolutionSpatialNorm3D,
}


def swap_classes(module: nn.Module, classes: dict[type, type]) -> None:
    """Gives every submodule of exactly a class in `classes` its successor's class, in place."""
    for part in module.modules():
        if type(part) in classes:
            part.__class__ = classes[type(part)]
