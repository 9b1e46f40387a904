"""A LoRA to be trained: `lora_alpha / rank · B·A` beside linear layers that stay as they are (arXiv 2106.09685).

Stages 1 and 4 set `rank`, `lora_alpha` and `lora_target_modules`.
"""

import re
from typing import Any

from peft import LoraConfig
from torch import nn

from common.config.errors import SettingError

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def check_lora_settings(settings: Any) -> None:
    """SettingError for what no model allows."""
    if not settings.lora_target_modules:
        raise SettingError("lora_target_modules", f"is empty; the usual are {list(ATTENTION_PROJECTIONS)}")
    if settings.lora_alpha <= 0:
        raise SettingError("lora_alpha", f"must be more than 0, got {settings.lora_alpha}")


def add_lora_factors(transformer: nn.Module, settings: Any, adapter: str = "default") -> None:
    """Adds new factors as PEFT's adapter of that name, active and trained, to all layers that the settings name.

    Raises SettingError when no linear layer has such a name.
    """
    linear = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    chosen = []  # in full: PEFT would take a convolution of the same name too
    for target in settings.lora_target_modules:
        chosen += (found := [name for name in linear if f".{name}".endswith(f".{target}")])
        if not found:
            ends = sorted({re.sub(r"^transformer_blocks\.\d+\.(attn1\.)?", "", name) for name in linear})
            raise SettingError("lora_target_modules", f"no linear layer ends in {target!r}; there are {ends}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        init_lora_weights=True,  # the second factor zero: training starts from the base
        target_modules=chosen,
    )
    transformer.add_adapter(config, adapter)
