"""Random weights for a model of any size, drawn and written a tensor at a time: a model larger than memory will do.

The scale is 1/√fan-in with zero biases and unit norms, so that activations keep the size they enter a layer with, block
after block, in float16 and bfloat16 too. diffusers' own start (PyTorch's, a third of that) is finite as well, but there
modulations shrink until the blocks hardly change what passes through: a poor stand-in when the effect of a changed
block (other attention, lower precision) is to be measured. T5 is drawn as transformers draws it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5EncoderModel


def write_random_weights(
    model: nn.Module,
    directory: Path,
    stem: str,
    dtype: torch.dtype,
    seed: int,
    max_shard_size: str,
    report: Callable[[int], None],
) -> None:
    """Writes weights for `model` (on the meta device) as safetensors, in shards with an index if one file is too small.

    Holds one shard in memory, and one tensor in float32.

    Args:
        stem: the weights' file name without ending, "model" or "diffusion_pytorch_model".
        max_shard_size: as huggingface_hub reads it, "2GB".
        report: told the bytes of each tensor once it is drawn.
    """
    state = {key: torch.empty_like(value, dtype=dtype) for key, value in untied_state(model).items()}
    pattern = f"{stem}{{suffix}}.safetensors"
    plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for file, keys in plan.filename_to_tensors.items():
        shard = {}
        for key in keys:
            shard[key] = draw(model, key, state[key].shape, generator).to(dtype)
            report(shard[key].nbytes)
        save_file(shard, directory / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of one tensor (T5's `encoder.embed_tokens` is `shared`)."""
    seen: set[int] = set()
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if not (id(v) in seen or seen.add(id(v)))}


def draw(model: nn.Module, key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """One parameter in float32: see the module's docstring."""
    if len(shape) == 1:
        return torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
    std = shape[1:].numel() ** -0.5
    if isinstance(model, T5EncoderModel):
        config = model.config
        if key == "shared.weight":
            std = 1.0
        elif key.endswith(".q.weight"):  # T5's attention does not divide by √d: its start does
            std *= config.d_kv**-0.5
        elif "relative_attention_bias" in key:
            std = config.d_model**-0.5
    return torch.empty(shape).normal_(0, std, generator=generator)
