"""Validation: the loss of a fixed held-out batch, and sample videos on disk and in TensorBoard.

Shapes: B batch · N raw frames · h w pixels.
"""

import io
import json
import logging
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from common.config.errors import UserError, is_out_of_memory
from common.data.video_writer import write_video
from common.training.encoding import EncodedBatch
from common.training.memory_advice import validation_advice
from common.training.metrics import RunLog
from common.training.objective import Objective
from common.training.random import SampleRandom

logger = logging.getLogger(__name__)

VALIDATION_SEED = 20_241_203  # of timesteps, noise and sample videos, in every run: curves of two runs compare


def split_batch(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """A loader's batch as batches of at most `size` samples; tensors and lists are cut alike."""
    total = len(batch["sample_ids"])
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, total, size)]


class Validator:
    """Runs the objective on what is never trained on. All processes do the same, so that collectives meet.

    Args:
        batch: the fixed held-out batch as the data loader gives it, or None for no held-out loss.
        control: one token per raw frame for the sample videos, or None.
    """

    def __init__(
        self,
        settings: Any,
        objective: Objective,
        accelerator: Accelerator,
        log: RunLog,
        batch: dict[str, Any] | None,
        control: list[str] | None,
    ):
        self.settings, self.objective, self.accelerator, self.log = settings, objective, accelerator, log
        self.control = control
        self.parts = split_batch(batch, settings.train_batch_size) if batch is not None else []
        self.encoded: list[EncodedBatch] = []  # on the CPU, from the first validation on

    def run(self, step: int, videos: bool = True) -> dict[str, float]:
        """Held-out metrics, which also go to the log as validation/…; then one video for each validation prompt."""
        with self._evaluating(step, videos):
            metrics = self._held_out_metrics()
            if metrics:
                self.log.write(step, {f"validation/{name}": value for name, value in metrics.items()})
                listed = "  ".join(f"{name} {value:.5f}" for name, value in metrics.items())
                logger.info("step %d  validation: %s", step, listed)
            for i, prompt in enumerate(self.settings.validation_prompts if videos else []):
                frames = self.objective.sample(prompt, self.control, VALIDATION_SEED + i)
                if self.accelerator.is_main_process:
                    self._show(step, i, prompt, frames)
        return metrics

    def is_done(self, step: int) -> bool:
        """True if a validation at `step` is in the log, or without held-out clips its last video on disk.

        Videos that failed after the loss was logged are not tried again. All processes call it.
        """
        if self.parts:
            is_there = self.log.has_validation(step)
        else:
            is_there = self._video(step, len(self.settings.validation_prompts) - 1).exists()
        return gather_object([is_there])[0]  # as the main process sees it, which writes

    @contextmanager
    def _evaluating(self, step: int, videos: bool):
        self.objective.module.eval()
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(validation_advice(self.settings, step, videos)) from error
            raise
        finally:
            self.objective.module.train()

    def _held_out_metrics(self) -> dict[str, float]:
        device = self.accelerator.device
        sums: dict[str, float] = defaultdict(float)
        total, first_slot = sum(len(part["sample_ids"]) for part in self.parts), 0
        for index, part in enumerate(self.parts):
            size = len(part["sample_ids"])
            # A sample's place in the held-out batch is its slot, so its draws do not depend on train_batch_size.
            rng = SampleRandom(VALIDATION_SEED, 0, range(first_slot, first_slot + size), device)
            if index == len(self.encoded):
                self.encoded.append(self.objective.encoder.encode(part, rng, training=False).to("cpu"))
            rng = SampleRandom(VALIDATION_SEED, 1, range(first_slot, first_slot + size), device)
            metrics = self.objective.validation_loss(self.encoded[index].to(device), rng)
            for name, value in metrics.items():
                sums[name] += float(value) * size / total
            first_slot += size
        return dict(sums)

    def _video(self, step: int, index: int) -> Path:
        return Path(self.settings.output_dir) / "validation" / f"step-{step}-{index}.mp4"

    def _show(self, step: int, index: int, prompt: str, frames: np.ndarray) -> None:
        """Writes the video, and beside it the JSON from which common.tools.contact_sheet draws its signals."""
        path = self._video(step, index)
        write_video(path, frames, self.settings.fps)
        control = None if self.control is None else ",".join(self.control)
        about = {"prompt": prompt, "control": control, "seed": VALIDATION_SEED + index, "step": step}
        path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        logger.info("step %d  sample video: %s", step, path)
        name = f"validation/{index}: {prompt[:60]}"
        if control is not None:
            name += f" ({self.settings.validation_control})"
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                add_tensorboard_video(tracker.tracker, name, frames, self.settings.fps, step)
            elif tracker.name == "wandb":
                import wandb

                tracker.tracker.log({name: wandb.Video(str(path))}, step=step)


def add_tensorboard_video(writer: Any, tag: str, frames: np.ndarray, fps: int, step: int) -> None:
    """Shows uint8 frames [N, h, w, 3] as an animated GIF, which is how TensorBoard shows videos.

    `SummaryWriter.add_video` does the same but needs moviepy.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    images = [Image.fromarray(frame) for frame in frames]
    gif = io.BytesIO()
    images[0].save(gif, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    writer.flush()


def validation_control(settings: Any, needs_control: bool) -> list[str] | None:
    """The control tokens of the sample videos; a wrong token is refused here, before a model is loaded."""
    if not (needs_control and settings.validation_control):
        return None
    from common.data.control_signals import CONTROL_TOKENS, parse_control_string

    return parse_control_string(settings.validation_control, CONTROL_TOKENS)
