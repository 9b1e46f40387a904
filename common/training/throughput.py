"""How fast training runs: operation counts, the device's peak, and a clock that leaves out what is not training.

Shapes: B batch · F latent frames · C latent channels · H W latent height/width · S tokens per latent frame ·
L text tokens · D model width.
"""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

# Dense bf16 products with float32 accumulation, operations per second, from the makers' data sheets.
PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
    "A10": 125e12,
}


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """The device's peak for bf16 training, or None if it is not known (CPU, other precisions, an unlisted GPU)."""
    if device.type != "cuda" or mixed_precision != "bf16":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    # Whole words, the most specific entry first: "NVIDIA H200" must not be taken for an "H20".
    for name in sorted(PEAK_BF16_FLOPS, key=len, reverse=True):
        if all(word in words for word in name.split()):
            return PEAK_BF16_FLOPS[name]
    return None


def measured_product(device: torch.device) -> dict[str, int | str | float]:
    """What a large matrix product reaches: "size", "dtype" and "flops_per_s".

    On a GPU 8192³ in bf16, of random numbers, since zeros would draw less power and let it run faster; on a CPU a small
    one in float32.
    """
    on_gpu = device.type == "cuda"
    size, dtype, repeats = (8192, torch.bfloat16, 50) if on_gpu else (512, torch.float32, 3)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    for counts in (False, True):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats if counts else max(1, repeats // 5)):
            torch.mm(a, b, out=out)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / repeats
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), "flops_per_s": 2 * size**3 / seconds}


class Operations(NamedTuple):
    """Of one forward: in products with weights, and in attention's products of activations with each other."""

    weights: float
    attention: float


def forward_operations(config, latent_shape: Sequence[int], text_tokens: int) -> Operations:
    """One forward of a CogVideoX transformer on latents [B, F, C, H, W] and L text tokens.

    Two operations per multiply-add, as torch.utils.flop_counter counts.
    """
    batch, frames, channels, height, width = latent_shape
    patch, time_dim = config.patch_size, config.time_embed_dim
    dim = config.num_attention_heads * config.attention_head_dim
    video = frames * (height // patch) * (width // patch)  # F·S
    tokens = video + text_tokens

    embed = 2 * video * channels * patch**2 * dim + 2 * text_tokens * config.text_embed_dim * dim
    time_embed = 2 * (dim * time_dim + time_dim**2)
    modulation = 2 * 2 * time_dim * 6 * dim  # two adaptive norms a layer
    linear = 2 * tokens * dim**2 * (4 + 8)  # q, k, v, out and the two of the feed-forward
    head = 2 * time_dim * 2 * dim + 2 * video * dim * patch**2 * config.out_channels
    weights = embed + time_embed + config.num_layers * (modulation + linear) + head
    attention = config.num_layers * 4 * tokens**2 * dim

    control_dim = getattr(config, "control_dim", None)
    if control_dim is not None:
        layers = config.control_end_layer - config.control_start_layer
        control = frames * config.control_tokens_per_frame  # F·K
        block = 4 * video * dim**2 + 4 * control * dim**2 + 2 * time_dim * 6 * dim
        weights += layers * block + 2 * frames * (control_dim**2 + control_dim * dim) + 2 * control * dim**2
        attention += layers * 4 * video * control * dim
    return Operations(float(batch * weights), float(batch * attention))


def forward_flops(config, latent_shape: Sequence[int], text_tokens: int) -> float:
    """All of `forward_operations`."""
    return sum(forward_operations(config, latent_shape, text_tokens))


def training_flops(module: nn.Module, latent_shape: Sequence[int], text_tokens: int) -> float | None:
    """Operations of a forward and its backward, without gradient checkpointing's recomputation (the M in MFU).

    The backward of a product is two: a gradient for either factor. Of weights only the trained share has one;
    attention has no weights. None if `module` has no CogVideoX config.
    """
    config = getattr(module, "config", None)
    if config is None or getattr(config, "patch_size_t", None) is not None or not hasattr(config, "time_embed_dim"):
        return None
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    trained_share = sum(n for n, trained in sizes if trained) / max(sum(n for n, _ in sizes), 1)
    forward = forward_operations(config, latent_shape, text_tokens)
    return forward.weights * (2 + trained_share) + 3 * forward.attention


class StepClock:
    """Seconds and work between two readings, over steps only.

    The first `warmup_steps` of a process (compilation, allocator, data workers) and everything between `pause` and
    `resume` (validation, checkpoints) do not count. Read it only after the device has been waited for.
    """

    def __init__(self, warmup_steps: int = 2):
        self.steps_to_skip = warmup_steps
        self._restart()

    def _restart(self) -> None:
        self.steps, self.tokens, self.flops, self.paused, self.waited = 0, 0, 0.0, 0.0, 0.0
        self.started = time.perf_counter()

    def step(self, tokens: int, flops: float | None) -> bool:
        """Counts a step. True if it was the last warm-up step: wait for the device, then call `read`."""
        if self.steps_to_skip > 0:
            self.steps_to_skip -= 1
            return self.steps_to_skip == 0
        self.steps += 1
        self.tokens += tokens
        self.flops += flops or 0.0
        return False

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """What it encloses counts as time in which the device got nothing new to do."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def pause(self) -> None:
        self.pause_started = time.perf_counter()

    def resume(self) -> None:
        self.paused += time.perf_counter() - self.pause_started

    def read(self) -> dict[str, float | None]:
        """Since the last reading: seconds per step, of which the share spent waiting for data, and this process's video
        tokens and operations per second."""
        seconds = time.perf_counter() - self.started - self.paused
        if self.steps == 0:
            rates = {"s_per_step": None, "data_wait": None, "tokens_per_s": None, "flops_per_s": None}
        else:
            rates = {
                "s_per_step": seconds / self.steps,
                "data_wait": self.waited / seconds,
                "tokens_per_s": self.tokens / seconds,
                "flops_per_s": self.flops / seconds or None,
            }
        self._restart()
        return rates


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
