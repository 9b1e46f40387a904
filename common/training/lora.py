"""A LoRA to be trained: `lora_alpha / rank · B·A` beside linear layers that stay as they are (arXiv 2106.09685).

Stage 1 trains one alone, stage 2 one beside the control adapter if `rank` says so, stage 4 one as its student.
"""

import re
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from common.config.errors import SettingError
from common.config.settings import TrainingSettings

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class SettingsWithLora(TrainingSettings):
    """Settings of stages that can train a LoRA."""

    rank: int = 0  # of the two factors that are added to each of the layers below; 0 for no LoRA
    lora_alpha: float = 64.0  # the product of the factors is scaled by lora_alpha / rank
    # ends of the linear layers' names; "ff.net.0.proj" and "ff.net.2" are the feed-forward's, for large changes of look
    lora_target_modules: list[str] = field(default_factory=lambda: list(ATTENTION_PROJECTIONS))

    def validate(self) -> None:
        super().validate()
        if self.rank < 0:
            raise SettingError("rank", f"must be 0 (no LoRA) or more, got {self.rank}")
        if not self.lora_target_modules:
            raise SettingError("lora_target_modules", f"is empty; the usual are {list(ATTENTION_PROJECTIONS)}")
        if self.lora_alpha <= 0:
            raise SettingError("lora_alpha", f"must be more than 0, got {self.lora_alpha}")


def add_lora_factors(
    transformer: nn.Module, settings: SettingsWithLora, adapter: str = "default", within: str = ""
) -> None:
    """Adds new factors as PEFT's adapter of that name, active and trained, to all layers that the settings name.

    `within`: to those alone whose names begin so. Raises SettingError when no linear layer has such a name.
    """
    layers = transformer.named_modules()
    linear = [name for name, layer in layers if isinstance(layer, nn.Linear) and name.startswith(within)]
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


def lora_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    """Name → layer of all that have factors."""
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}


@torch.no_grad()
def add_lora_products(transformer: nn.Module, trained: nn.Module, adapter: str = "default") -> None:
    """Adds to the plain weights of `transformer`, in place, what `trained` has beside its own as that adapter."""
    for name, layer in lora_layers(trained).items():
        weight = transformer.get_submodule(name).weight
        first, second = (factors[adapter].weight.to(weight) for factors in (layer.lora_A, layer.lora_B))
        weight += layer.scaling[adapter] * (second @ first)  # not PEFT's product: of bfloat16 factors that is rounded
