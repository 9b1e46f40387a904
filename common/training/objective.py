"""What a stage gives to the trainer: its models, its loss, what it leaves behind.

The trainer knows nothing about stages. It calls, in this order:

    objective = settings.build_objective()
    objective.describe()                      --dry_run ends here
    objective.load(device, weight_dtype)
    objective.module = accelerator.prepare(objective.module)
    loop:  objective.loss(objective.encoder.encode(batch, rng), rng) → backward, clip, step
           objective.after_optimizer_step(step)
           once in a while: objective.validation_loss, objective.sample, a checkpoint
    objective.export(output_dir)

Shapes: B batch · F latent frames · C latent channels · H W latent height/width · N raw frames.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from common.training.encoding import EncodedBatch, LatentEncoder
from common.training.random import SampleRandom
from common.training.throughput import training_flops


class Objective(ABC):
    """A stage's side of training. Subclasses set `module` and `encoder` in `load`.

    Attributes:
        needs_control: the data must carry control signals.
        adds_to_base: what is exported is the base's weights, read once more, and what was learnt added to them.
        module: THE trainable module. `requires_grad` marks what is trained; that is in the type of `trained_weights`,
            all else in the compute dtype. The trainer wraps it for several processes and puts the wrapped one back
            here: call it as it is in `loss`; use `plain_module` where its class or its config matter.
        encoder: turns the loader's batches into EncodedBatch.
    """

    needs_control: bool = False
    adds_to_base: bool = False
    module: nn.Module
    encoder: LatentEncoder

    def __init__(self, settings: Any):
        self.settings = settings

    @property
    def plain_module(self) -> nn.Module:
        """`module` without DDP's or torch.compile's wrapper (FSDP2 has none): same weights, own class and config."""
        return extract_model_from_parallel(self.module, keep_torch_compile=False)

    @abstractmethod
    def load(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        """Builds every model from `settings.pretrained_model_name_or_path` and sets `module` and `encoder`.

        The global generators are seeded alike on every process before, so new weights agree. Which blocks
        recompute (gradient_checkpointing) is set by the trainer.
        """

    @abstractmethod
    def loss(self, batch: EncodedBatch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch's samples, to be differentiated, and detached scalar metrics.

        Everything random comes from `rng`. Nothing here may wait for the device (`.item()`, `if tensor`).
        """

    @abstractmethod
    def export(self, output_dir: Path) -> None:
        """Writes the deliverable into `output_dir`: a complete pipeline directory (stage 1: the LoRA file).

        Called on the main process only, when training has ended, with `module` unwrapped and all weights complete.
        """

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Derived sizes for `--dry_run` (tokens, windows, parameter counts) from configs alone, without weights."""

    def sample(self, prompt: str, control: list[str] | None, seed: int) -> np.ndarray:
        """A validation video, uint8 [N, h, w, 3]. Every process makes the same one, so FSDP2's collectives meet."""
        raise NotImplementedError(f"{type(self).__name__} has no sample(): leave validation_prompts empty")

    def validation_loss(self, batch: EncodedBatch, rng: SampleRandom) -> dict[str, Tensor]:
        """Metrics of held-out samples, means over the batch, without gradient.

        `rng` is the same at every step. Override it to report the loss at timesteps chosen by hand; by default the
        timesteps are whatever `loss` draws from that fixed `rng`.
        """
        loss, metrics = self.loss(batch, rng)
        return {"loss": loss.detach(), **metrics}

    def compile(self) -> None:
        """Compiles what runs in every step; called before `module` is wrapped for its processes."""
        self.module.compile()

    def trained_transformers(self) -> list[nn.Module]:
        """Those in `module`, before it is wrapped, that of the result first; their blocks recompute as
        `gradient_checkpointing` says."""
        return [self.module] if hasattr(self.module, "transformer_blocks") else []

    def learning_rate(self, name: str) -> float:
        """Peak learning rate of a parameter of `module`. Several are for AdamW, in any form, and not for Muon."""
        return self.settings.learning_rate

    def after_optimizer_step(self, step: int) -> None:
        """What follows an optimizer step, such as an EMA update. `step` counts the finished steps.

        With `cuda_graph` it is recorded with the step: what it does on the device is repeated, the call is not.
        """
        return None

    def frozen_roles(self) -> dict[str, nn.Module]:
        """The models that run in training and that no gradient trains (teacher, EMA …), by the attribute holding them.

        FSDP2 shards them as it shards `module`; for `export` the attributes hold whole ones again.
        """
        return {}

    def checkpoint_modules(self) -> dict[str, Any]:
        """Further modules whose state a resumed run needs (EMA …), by name; any object with a module's `state_dict` and
        `load_state_dict` will do."""
        return {}

    def num_video_tokens(self, latents: Tensor) -> int:
        """Video tokens in latents [B, F, C, H, W] after patching: the unit of the logged throughput."""
        batch, frames, _, height, width = latents.shape
        patch = getattr(getattr(self.plain_module, "config", None), "patch_size", 1)
        return batch * frames * (height // patch) * (width // patch)

    def step_flops(self, batch: EncodedBatch) -> float | None:
        """Floating-point operations of one micro-batch, forward and backward, without recomputation; None if unknown.

        By default one forward and backward of `plain_module`, by formula from its CogVideoX config. Override it where a
        teacher runs as well.
        """
        return training_flops(self.plain_module, batch.latents.shape, batch.prompt_embeds.shape[1])
