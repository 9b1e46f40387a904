"""Compiling a transformer block by block: minutes sooner ready than compiled in one piece."""

import torch
from torch import nn

MAX_COMPILED_KINDS = 64  # of calls of a block


def compile_blocks(transformer: nn.Module) -> None:
    """Compiles each block by itself: they are alike, so one is compiled and the others reuse it.

    Once for every kind of call: window length, dtype, with or without gradient, training or validation batch; that may
    be more often than torch allows unasked.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_KINDS)
    for block in (*transformer.transformer_blocks, *(getattr(transformer, "control_blocks", None) or ())):
        block.compile(fullgraph=True, dynamic=False)
