"""What a training step changes: the module's weights, the optimizer, the schedule, the step; made, restored, saved."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from common.cogvideox.recomputation import recompute_blocks
from common.config.errors import SettingError, UserError
from common.training import checkpoints, optimizers
from common.training.accelerator import compute_dtype
from common.training.export import SETTINGS, export_pipeline, make_skeleton
from common.training.metrics import FiniteGuard, Means
from common.training.objective import Objective
from common.training.random import seed_everything
from common.training.sharding import prepare_sharding, shard_frozen

logger = logging.getLogger(__name__)

# Parameters, moments and checkpoints would be read as whole where each process has a part.
UNKNOWN_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_layout(settings: Any, accelerator: Accelerator) -> None:
    """UserError for what these processes cannot do, before anything is loaded."""
    if accelerator.distributed_type in UNKNOWN_SHARDING and not accelerator.is_fsdp2:
        raise UserError(
            f"ACCELERATE_CONFIG_FILE: {accelerator.distributed_type.value} is not supported, but FSDP with "
            "fsdp_version: 2 (accelerate's default is 1); take scripts/accelerate/fsdp2.yaml, or ddp.yaml there"
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise UserError(
            f"ACCELERATE_CONFIG_FILE: its dynamo_config ({backend.value}) would compile the model as a whole, under "
            "other names; leave it out and take the setting compile"
        )
    if settings.cuda_graph and accelerator.num_processes > 1:
        raise SettingError("cuda_graph", f"is for one process, here are {accelerator.num_processes}")
    if settings.step_in_backward and accelerator.distributed_type != DistributedType.NO:
        # DDP puts gradients of zero where none should be left, FSDP2 replaces the parameters that the steps hang on.
        raise SettingError("step_in_backward", "is for one process without DDP or FSDP, even of that process alone")
    if not accelerator.is_fsdp2:
        return
    if settings.optimizer == "muon":
        raise SettingError("optimizer", "muon needs whole matrices, which FSDP shards; use adamw, or DDP")
    if settings.trained_weights != "float32":
        raise SettingError("trained_weights", "accelerate has FSDP2 hold float32 weights; leave it at 'float32'")


class TrainingState:
    """Loads the objective, wraps it for the processes at hand and takes up `checkpoint`.

    Args:
        checkpoint: where to continue; None begins at step 0.
        held_out: names of the held-out clips.
        training_clips: what tells the training clips from others; see `checkpoints.describe_clips`.

    Attributes:
        step: finished optimizer steps.
        parameters: name → trained parameter.
        means, guard: what the log line under way is made of.
    """

    def __init__(
        self,
        settings: Any,
        objective: Objective,
        accelerator: Accelerator,
        checkpoint: Path | None,
        held_out: Sequence[str] = (),
        training_clips: dict[str, Any] | None = None,
    ):
        check_layout(settings, accelerator)
        self.settings, self.objective, self.accelerator = settings, objective, accelerator
        self.held_out, self.training_clips = list(held_out), training_clips
        self.output_dir = Path(settings.output_dir)
        self.step, self.saved_step = 0, -1
        self.means, self.guard = Means(accelerator.device), FiniteGuard(accelerator.device)
        self.base = checkpoints.base_digest(settings)  # now: another run may replace the base while this one trains
        saved = self._check(checkpoint) if checkpoint is not None else {}
        accelerator.wait_for_everyone()  # until all have read what is there
        if accelerator.is_main_process:
            checkpoints.remove_leftovers(self.output_dir)
            settings.save(self.output_dir / SETTINGS)

        self._load_objective(checkpoint)
        module = objective.module
        self.skeletons: dict[str, torch.nn.Module] = {}  # whole but empty twins of what is sharded, for `export`
        if accelerator.is_fsdp2:
            frozen = objective.frozen_roles()
            self.skeletons = {name: make_skeleton(m) for name, m in {"module": module, **frozen}.items()}
            prepare_sharding(accelerator, module)
            for role in frozen.values():
                shard_frozen(accelerator, role)
        # Optimizer and module go through `prepare` together: FSDP2 replaces the parameters.
        optimizer = optimizers.build_optimizer(settings, module, objective.learning_rate)
        objective.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.parameters = optimizers.trained_parameters(objective.plain_module)
        self.lr_scheduler = optimizers.build_lr_scheduler(settings, self.optimizer.optimizer)
        if checkpoint is not None:
            self.step = self.saved_step = saved["step"]
            moments = checkpoints.read_tensors(checkpoint, "optimizer")
            optimizers.load_optimizer_state(self.optimizer.optimizer, self.parameters, moments)
            optimizers.restore_lr_scheduler(self.lr_scheduler, self.optimizer.optimizer, self.step)
            self.means.load_state(saved["means"])
            logger.info("resumed from %s", checkpoint)

    def _check(self, checkpoint: Path) -> dict[str, Any]:
        """The checkpoint's state.json, if this run may continue it."""
        checkpoints.check_same_run(checkpoint, checkpoints.read_json(checkpoint, "settings.json"), self.settings)
        saved = checkpoints.read_state(checkpoint)
        if self.held_out and saved.get("held_out") and saved["held_out"] != self.held_out:
            logger.warning(
                "the held-out clips were %s, now they are %s: the index has changed. From here on validation/loss is "
                "of others, and what was held out is trained on; validation_index_file holds out the same always",
                *(", ".join(names[:3]) + " …" * (len(names) > 3) for names in (saved["held_out"], self.held_out)),
            )
        before = saved.get("training_clips")
        if self.training_clips and before and before != self.training_clips:
            logger.warning(
                "the training clips are not those of %s (%d then, %d now): the index has changed. From here on their "
                "order is another one, in which this epoch may show a clip twice or not at all",
                checkpoint, before["number"], self.training_clips["number"],
            )  # fmt: skip
        checkpoints.check_same_base(checkpoint, saved, self.base, self.settings)
        if saved["samples_per_micro_step"] != self.samples_per_micro_step:
            raise UserError(
                f"{checkpoint} was made with train_batch_size × processes = {saved['samples_per_micro_step']}, here "
                f"it is {self.settings.train_batch_size} × {self.accelerator.num_processes}; make the products equal"
            )
        return saved

    def _load_objective(self, checkpoint: Path | None) -> None:
        settings, objective, accelerator = self.settings, self.objective, self.accelerator
        seed_everything(settings.seed)  # weights that begin at random are the same on every process
        objective.load(accelerator.device, compute_dtype(settings, accelerator.device))
        module = objective.module
        for transformer in objective.trained_transformers():
            recompute_blocks(transformer, settings.gradient_checkpointing)
        if settings.compile:
            torch._functorch.config.activation_memory_budget = settings.activation_budget
            objective.compile()
        module.train()
        if checkpoint is not None:
            checkpoints.load_module_state(module, checkpoints.read_tensors(checkpoint, "weights"), checkpoint)
            for name, extra in objective.checkpoint_modules().items():
                extra.load_state_dict(checkpoints.read_tensors(checkpoint, name))

    @property
    def samples_per_micro_step(self) -> int:
        return self.settings.train_batch_size * self.accelerator.num_processes

    def optimizer_step(self) -> torch.Tensor:
        """Clips, steps, clears the gradients. Returns the gradient's norm before clipping."""
        if self.settings.step_in_backward:
            norm = self.optimizer.optimizer.gradient_norm()  # nothing else is left to do: no gradient is there
        else:
            norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.settings.max_grad_norm)
        if self.settings.optimizer == "adamw_8bit":  # it rounds at random: alike in all processes
            seed_everything(self.settings.seed, "optimizer", self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_optimizer_step(self.step + 1)
        return optimizers.whole_tensor(norm)

    def advance(self) -> None:
        """The step is done: it counts, and the next one has its own learning rate."""
        self.lr_scheduler.step()
        self.step += 1

    @property
    def learning_rate(self) -> float:
        """Of the last finished step, the optimizer having the next one's. It may be on the device, for which this
        waits."""
        return float(self.lr_scheduler.base_lrs[0] * self.lr_scheduler.lr_lambdas[0](self.step - 1))

    def save(self) -> None:
        """Writes checkpoint-`step` unless it is written already. All processes gather, the main one writes."""
        if self.saved_step == self.step:
            return
        self.guard.check(self.accelerator)
        keep = self.accelerator.is_main_process
        parts = {
            "weights": checkpoints.module_state(self.objective.plain_module),
            "optimizer": optimizers.optimizer_state(self.optimizer.optimizer, self.parameters),
            **{name: extra.state_dict() for name, extra in self.objective.checkpoint_modules().items()},
        }
        tensors = {name: optimizers.gather_tensors(part, keep) for name, part in parts.items()}
        state = {
            "means": self.means.state(self.accelerator),
            "samples_per_micro_step": self.samples_per_micro_step,
            "base": self.base,
            "held_out": self.held_out,
            "training_clips": self.training_clips,
        }
        if keep:
            path = checkpoints.write_checkpoint(self.output_dir, self.step, tensors, state, self.settings)
            checkpoints.keep_newest(self.output_dir, self.settings.checkpoints_total_limit)
            logger.info("saved %s", path)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step

    def export(self) -> None:
        """Writes the deliverable, then the mark by which the next run of the same command knows. Ends the state."""
        keep = self.accelerator.is_main_process
        for name, skeleton in self.skeletons.items():
            weights = optimizers.gather_tensors(getattr(self.objective, name).state_dict(), keep)
            if keep:
                skeleton.load_state_dict(weights, assign=True)
                setattr(self.objective, name, skeleton)
        if keep:
            export_pipeline(self.objective, self.output_dir, self.step, self.settings, self.base)
            logger.info("finished: %s", self.output_dir)
        self.accelerator.wait_for_everyone()
