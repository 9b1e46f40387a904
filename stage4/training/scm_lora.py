"""Stage 4 in little memory: student and target are LoRAs over one frozen base, and the base is the teacher.

The loss is that of scm.py. What differs is where the three roles' weights lie: the base once, in the compute type, and
beside it two small sets of factors, of which one is trained and the other follows it in float32. After LCM-LoRA,
arXiv 2311.05556.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cogvideox.compilation import compile_blocks
from common.cogvideox.pipeline_io import load_component
from common.training.lora import add_lora_factors, add_lora_products, lora_layers
from stage4.training.scm import SCMObjective

STUDENT, TARGET = "student", "target"  # PEFT's names of the two sets of factors


class AdapterRole:
    """A transformer with one of its adapters, or with none, where a model of its own is expected.

    Outside of its calls the transformer is the student, so that the backward recomputes the student's blocks. Training
    mode stays on in all roles: it matters to dropout alone, of which CogVideoX has none.
    """

    def __init__(self, transformer: nn.Module, adapter: str | None):
        self.transformer, self.adapter = transformer, adapter
        self.layers = lora_layers(transformer).values()

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """Inside, the transformer itself has this role."""
        self._switch(self.adapter)
        try:
            yield self.transformer
        finally:
            self._switch(STUDENT)

    def _switch(self, adapter: str | None) -> None:
        # PEFT's own set_adapter and enable_adapters would, four times a step, also change what is trained.
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or STUDENT]

    def __call__(self, **inputs: Any) -> Any:
        with self.in_place() as transformer:
            return transformer(**inputs)


class TargetRole(AdapterRole):
    """The target, with as much of a module as its moving average and a checkpoint ask for."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The target's factors, each under the name of the student's that it follows."""
        for name, parameter in self.transformer.named_parameters():
            if f".{self.adapter}." in name:
                yield name.replace(f".{self.adapter}.", f".{STUDENT}."), parameter

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])


class LoraSCMObjective(SCMObjective):
    """The roles of stage 4 over one transformer, whose adapters are switched from forward to forward."""

    trains_base = False  # so it is held in the compute type
    adds_to_base = True

    def make_module(self, transformer: nn.Module) -> nn.Module:
        add_lora_factors(transformer, self.settings, STUDENT)
        return transformer

    def make_roles(self) -> None:
        """Both roles are the plain transformer, while the student is called through DDP's wrapper."""
        module = self.module
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that the model has an adapter is meant
            module.add_adapter(module.peft_config[STUDENT], TARGET)
        for layer in lora_layers(module).values():
            for factors in (layer.lora_A, layer.lora_B):
                factors[TARGET] = copy.deepcopy(factors[STUDENT]).float()
        module.set_adapter(STUDENT)  # the one that is trained; the other is frozen
        self.teacher, self.target = AdapterRole(module, None), TargetRole(module, TARGET)

    def compile(self) -> None:
        compile_blocks(self.module)

    def frozen_roles(self) -> dict[str, nn.Module]:
        return {}  # they are the module, and sharded with it

    def sample(self, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        with self.target.in_place() as transformer:
            return self.sample_with(transformer, prompt, control, seed)

    def exported(self) -> nn.Module:
        """The base with the target's factors added to its weights: on the CPU, and in float32, of which the base in use
        may be a rounded copy."""
        transformer = load_component(self.base_dir, "transformer")
        add_lora_products(transformer, self.plain_module, TARGET)
        return transformer
