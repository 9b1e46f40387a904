"""What is said when memory runs out: the settings that help, of those that fit the ones at hand."""

from typing import Any


def training_advice(settings: Any, batch_shape: tuple[int, ...] | None, is_sharded: bool) -> str:
    """For a training step, or for loading.

    Args:
        batch_shape: of the latents last encoded [B,F,C,H,W], None before the first.
        is_sharded: under FSDP2.
    """
    s = settings
    hints = [f"lower train_batch_size (now {s.train_batch_size})"] if s.train_batch_size > 1 else []
    if s.cuda_graph:
        hints.append("set cuda_graph = False and gradient_checkpointing = True")
    else:
        hints += [] if s.gradient_checkpointing is True else ["set gradient_checkpointing = True"]
        hints += ["train anew with optimizer = 'adamw_8bit'"] if s.optimizer == "adamw" else []
    hints += [] if s.latent_cache_dir else ["encode the videos once (common.tools.precompute), set latent_cache_dir"]
    hints.append(
        f"use fewer frames or smaller sizes (frame_buckets {s.frame_buckets}, height_buckets {s.height_buckets}, "
        f"width_buckets {s.width_buckets})"
    )
    if is_sharded:
        hints.append("share the model among more GPUs")
    elif s.optimizer != "muon" and s.trained_weights == "float32" and not (s.step_in_backward or s.cuda_graph):
        hints.append("share the model among GPUs (ACCELERATE_CONFIG_FILE=scripts/accelerate/fsdp2.yaml)")
    shape = f" on latents {list(batch_shape)} [B,F,C,H,W]" if batch_shape else ""
    return f"out of memory{shape}: {'; '.join(hints)}"


def validation_advice(settings: Any, step: int, videos: bool) -> str:
    """For a validation, with sample videos or without; what it names may change in a run that goes on."""
    hints = ["cuda_graph = False"] if settings.cuda_graph else []
    hints += ["validation_prompts = [] (no sample videos)"] if videos and settings.validation_prompts else []
    return f"out of memory in the validation of step {step}: set {' or '.join([*hints, 'validation_steps = 0'])}"
