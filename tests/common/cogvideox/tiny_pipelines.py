"""Tiny, untrained models with control for tests of the pipelines."""

import torch

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel

NAMES = ["D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR"]
PROMPT = "A red car."
SIZE = {"height": 32, "width": 48}


def controlled(base, scheduler, **changes):
    """Components of a stage-2 or later model whose control blocks do something."""
    torch.manual_seed(1)
    settings = {
        "control_dim": 12, "control_start_layer": 1, "control_end_layer": 3, "control_attention": "frame_causal",
        "control_zero_init": False,
    }  # fmt: skip
    transformer = CogVideoXControlTransformer3DModel.from_transformer(base["transformer"], **{**settings, **changes})
    vocabulary = ControlVocabulary.orthogonal(NAMES, 12)
    parts = {"transformer": transformer.eval(), "scheduler": scheduler, "control_vocabulary": vocabulary}
    return {**base, **parts}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
