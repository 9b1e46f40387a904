"""Activation checkpointing: blocks that keep only their inputs and are run once more in the backward pass.

Between none (fast, much memory) and all (little memory, a third more work) lies a number of blocks, so that the memory
there is can be used up. Each block is recomputed as a whole, from outside, whether it is compiled or not.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from common.config.errors import SettingError


def recomputed_layers(num_layers: int, wanted: int | bool) -> list[int]:
    """Which of a transformer's layers recompute: `wanted` of them spread evenly, True for all.

    Spread and not the first ones: in stage 2 without a LoRA the lower layers keep nothing anyway, since nothing below
    the first control block is trained. The last layer keeps what it has computed unless all recompute: the backward
    needs it at once, when memory is fullest.

    Raises SettingError when there are not so many.
    """
    count = num_layers if wanted is True else int(wanted)
    if count > num_layers:
        raise SettingError("gradient_checkpointing", f"is {count}; the model has {num_layers} blocks, True is all")
    kept = num_layers - count
    return [layer for layer in range(num_layers) if (num_layers - 1 - layer) * kept % num_layers >= kept]


def recompute_blocks(transformer: nn.Module, wanted: int | bool) -> None:
    """Has `wanted` layers (see `recomputed_layers`) of a CogVideoX transformer, diffusers' or ours, recompute where
    gradients are wanted; the control block that follows a layer does as the layer."""
    layers = recomputed_layers(len(transformer.transformer_blocks), wanted)
    chosen = {transformer.transformer_blocks[layer] for layer in layers}
    if control_blocks := getattr(transformer, "control_blocks", None):
        start = transformer.config.control_start_layer
        chosen |= {block for layer, block in enumerate(control_blocks, start) if layer in layers}

    def run(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False) if block in chosen else block(*inputs)

    transformer.disable_gradient_checkpointing()
    if chosen:
        transformer.enable_gradient_checkpointing(run)
