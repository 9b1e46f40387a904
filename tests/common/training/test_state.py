"""What a finished step does to the training state."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy_settings

from common.training import optimizers
from common.training.state import TrainingState
from common.training.trainer import Trainer


class NumbersRead(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers of tensors that Python reads."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_learning_rate_on_the_device_is_read_for_log_lines_alone(toy_data, tmp_path, monkeypatch):
    build_optimizer, advance, read = optimizers.build_optimizer, TrainingState.advance, NumbersRead()

    def build_with_tensors(*arguments):
        optimizer = build_optimizer(*arguments)
        for group in optimizer.param_groups:  # as for a recorded step
            group["lr"] = torch.tensor(group["lr"])
        return optimizer

    def watched(state):
        with read:
            advance(state)

    monkeypatch.setattr(optimizers, "build_optimizer", build_with_tensors)
    monkeypatch.setattr(TrainingState, "advance", watched)
    for last in (4, 6):  # the second run resumes
        more = {"lr_warmup_steps": 4, "learning_rate": 0.008, "logging_steps": 2, "max_train_steps": last}
        settings = toy_settings(toy_data, tmp_path, **more)
        Trainer(settings, settings.build_objective()).train()
    assert read.count == 0
    lines = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([0.002, 0.006, 0.008])  # of steps 2, 4 and 6
