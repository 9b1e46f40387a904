"""An objective of a few hundred parameters on real video files: everything of training but a video model.

Its latents are pixels averaged over 16×16 blocks plus "posterior" noise: [B, F, 3, 2, 2] of N = 4(F−1)+1 frames.
"""

import copy
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from common.config.settings import TrainingSettings
from common.training.ema import update_ema
from common.training.encoding import EncodedBatch
from common.training.objective import Objective


@dataclass
class ToySettings(TrainingSettings):
    dropout: float = 0.0  # of the module: draws from the global generator

    def build_objective(self):
        return ToyObjective(self)


def toy_settings(data_root, output_dir, **changes) -> ToySettings:
    settings = ToySettings()
    defaults = {
        "pretrained_model_name_or_path": str(data_root), "data_root": str(data_root), "output_dir": str(output_dir),
        "index_file": str(Path(data_root) / "index.json"), "num_validation_clips": 3, "height_buckets": [32],
        "width_buckets": [32], "frame_buckets": [9], "dataloader_num_workers": 0, "max_train_steps": 4,
        "learning_rate": 1e-2, "lr_warmup_steps": 3, "train_batch_size": 2, "checkpointing_steps": 1000,
        "logging_steps": 1, "validation_steps": 0, "report_to": "none", "gradient_checkpointing": False,
    }  # fmt: skip
    for name, value in {**defaults, **changes}.items():
        setattr(settings, name, value)
    settings.validate()
    return settings


class ToyEncoder:
    def encode(self, batch, rng, training=True) -> EncodedBatch:
        blocks = batch["pixel_values"][:, ::4].float().div(127.5).sub(1).unfold(3, 16, 16).unfold(4, 16, 16)
        latents = blocks.mean(dim=(-1, -2))  # [B, F, 3, 2, 2]
        latents = latents + 0.1 * rng.normal(latents.shape[1:])
        text = torch.tensor([[[float(len(caption))]] for caption in batch["captions"]])
        return EncodedBatch(latents, text, batch.get("control_indices"), batch["sample_ids"])


class ToyObjective(Objective):
    poison_step = -1  # the loss of this step (from 0) is NaN
    out_of_memory_step = -1  # this step (from 0) fails for want of memory
    signal_step = -1  # SIGTERM to the own process after this many steps
    step_seconds = float(os.environ.get("TOY_STEP_SECONDS", "0"))  # slows every step down

    def load(self, device, weight_dtype) -> None:
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.module = nn.Sequential(
            self.frozen, nn.Linear(12, 16), nn.SiLU(), nn.Dropout(self.settings.dropout), nn.Linear(16, 12)
        )
        self.average = copy.deepcopy(self.module)
        self.encoder = ToyEncoder()
        self.step = 0

    def loss(self, batch, rng):
        t = rng.randint(1, 10).float()[:, None, None] / 10  # [B, 1, 1]
        x = batch.latents.flatten(2)  # [B, F, 12]
        noise = rng.normal(x.shape[1:])
        predicted = self.module(x * (1 - t) + noise * t)
        loss = (predicted - (noise - x)).square().mean()
        if self.step == self.poison_step:
            loss = loss * float("nan")
        if self.step == self.out_of_memory_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss, {"mean_t": t.mean()}

    def after_optimizer_step(self, step) -> None:
        update_ema(self.average, self.plain_module, 0.9)
        self.step = step
        time.sleep(self.step_seconds)
        if step == self.signal_step:
            os.kill(os.getpid(), signal.SIGTERM)

    def checkpoint_modules(self):
        return {"ema": self.average}

    def sample(self, prompt, control, seed):
        if prompt == "fail":
            raise RuntimeError("sampling failed")
        return np.random.default_rng(seed).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)

    def export(self, output_dir: Path) -> None:
        save_file(self.module.state_dict(), output_dir / "exported.safetensors")

    def describe(self):
        return {"trained parameters": 412}
