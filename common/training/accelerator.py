"""accelerate's Accelerator, as the trainer wants it: in one process, or several under DDP or FSDP2."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs


def compute_dtype(settings: Any, device: torch.device) -> torch.dtype:
    """The type of products and of frozen weights. A CPU computes in float32 unless the weights are of less."""
    is_bf16 = settings.mixed_precision == "bf16" and (device.type != "cpu" or settings.trained_weights == "bfloat16")
    return torch.bfloat16 if is_bf16 else torch.float32


def build_accelerator(settings: Any) -> Accelerator:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torch 2.13 has another name for it, which the oldest torch that we run on does not know.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if compute_dtype(settings, device) == torch.bfloat16 else "no",
        log_with=None if settings.report_to == "none" else settings.report_to,
        # The trainer adds gradients up itself; this way no variable of the environment makes accelerate divide as well.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        project_dir=str(Path(settings.output_dir) / "logs"),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # no buffer of a transformer changes in training
                gradient_as_bucket_view=True,
                bucket_cap_mb=200,  # on two H200s a step of stage 3 takes .602 s with these and .617 with PyTorch's 25
            ),
            # The others wait while one process writes a checkpoint, perhaps to a slow disk.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
