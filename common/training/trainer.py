"""The one training loop. What is trained, and by which loss, is the objective's; see objective.py.

The same loop runs in one process and, started by `accelerate launch`, under DDP or FSDP2. Everything drawn is a
function of (seed, step, sample) and the data's position is a function of the step, so that a run may be stopped and
resumed, or spread over more processes, and still trains the same.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.config.errors import UserError, is_out_of_memory
from common.data.loader import TrainLoader, build_train_loader, build_validation_batch
from common.training.accelerator import build_accelerator
from common.training.checkpoints import describe_clips, find_checkpoint, read_state
from common.training.encoding import EncodedBatch
from common.training.export import check_result_is_kept, finished_steps, is_finished
from common.training.interruption import StopRequest
from common.training.memory_advice import training_advice
from common.training.metrics import RunLog
from common.training.objective import Objective
from common.training.random import SampleRandom, seed_everything
from common.training.state import TrainingState
from common.training.step_graph import StepGraph
from common.training.throughput import StepClock, peak_flops, peak_memory_gib
from common.training.validation import Validator, validation_control

logger = logging.getLogger(__name__)


class Trainer:
    """Trains an objective as the settings say, from the newest checkpoint if there is one, and exports the result.

    Args:
        settings: validated settings.
        objective: what `settings.build_objective()` returned, nothing loaded yet.
        build_loader, build_held_out: where data come from; common.data's by default.
    """

    def __init__(
        self,
        settings: Any,
        objective: Objective,
        build_loader: Callable[..., Any] | None = None,
        build_held_out: Callable[..., dict[str, Any] | None] | None = None,
    ):
        self.settings, self.objective = settings, objective
        self.build_loader = build_loader or build_train_loader
        self.build_held_out = build_held_out or build_validation_batch
        self.output_dir = Path(settings.output_dir)
        self.accelerator = build_accelerator(settings)
        self.batch_shape: tuple[int, ...] | None = None
        self.step_graph: StepGraph | None = None

    def train(self) -> None:
        """Runs to max_train_steps and exports; or to SIGTERM or SIGINT, saves and returns.

        Raises UserError for what the user can mend: settings other than the checkpoint's, an output directory that
        cannot be written, a loss that is not finite, memory that runs out.
        """
        finished = is_finished(self.output_dir, self.settings)
        checkpoint = find_checkpoint(self.settings)
        found = "a finished run" if finished else checkpoint.name if checkpoint else "no checkpoint"
        steps = finished_steps(self.output_dir)
        check_shared(f"{found} and a result of {steps} steps" if steps else found)
        if finished:
            logger.info("%s is finished; nothing to do", self.output_dir)
            self.accelerator.end_training()
            return
        control = validation_control(self.settings, self.objective.needs_control)
        try:
            with StopRequest() as stop, logging_redirect_tqdm():
                self.set_up(checkpoint, control)
                stop.connect()
                completed = self.loop(stop)
                self.state.save()
                if completed:
                    self.state.export()
                else:
                    how = (
                        ""
                        if self.settings.resume_from_checkpoint == "latest"
                        else " with resume_from_checkpoint latest"
                    )
                    logger.info("stopped and saved at step %d; the same command%s goes on", self.state.step, how)
            self.accelerator.end_training()
        except Exception as error:
            if is_out_of_memory(error):
                raise UserError(self.out_of_memory_advice()) from error
            raise
        finally:
            self.batches = None  # ends the data workers

    def set_up(self, checkpoint: Path | None, control: list[str] | None) -> None:
        """Models, log, and data from the checkpoint's step on."""
        settings, accelerator = self.settings, self.accelerator
        # Data first: what is wrong with them is said before anything is loaded or written.
        step = 0 if checkpoint is None else read_state(checkpoint)["step"]
        check_result_is_kept(self.output_dir, step)
        self.batches, held_out, clips = self.read_data(step * settings.gradient_accumulation_steps)
        check_writable(self.output_dir)
        held_out_ids = list(held_out["sample_ids"]) if held_out else []
        self.state = TrainingState(settings, self.objective, accelerator, checkpoint, held_out_ids, clips)
        if settings.cuda_graph:
            self.step_graph = StepGraph(self.micro_step, accelerator.device)
        self.log = RunLog(self.output_dir, self.state.step, settings.report_to, accelerator)
        self.clock = StepClock()
        self.peak_flops = peak_flops(accelerator.device, accelerator.mixed_precision)
        self.flops_by_shape: dict[tuple[int, ...], float | None] = {}
        self.validator = Validator(settings, self.objective, accelerator, self.log, held_out, control)

    def read_data(
        self, start_micro_step: int
    ) -> tuple[Iterator[dict[str, Any]], dict[str, Any] | None, dict[str, Any] | None]:
        """Training batches, of which the first is read now, the held-out batch, and which the training clips are."""
        settings, needs_control = self.settings, self.objective.needs_control
        loader = self.build_loader(
            settings,
            needs_control=needs_control,
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            start_step=start_micro_step,
        )
        held_out = self.build_held_out(settings, needs_control=needs_control) if settings.validation_steps else None
        clips = describe_clips(loader.dataset.dataset.records) if isinstance(loader, TrainLoader) else None
        batches = iter(loader)
        return chain([next(batches)], batches), held_out, clips

    def loop(self, stop: StopRequest) -> bool:
        """Steps, and once in a while a log line, a checkpoint, a validation. False if asked to stop."""
        settings, state, last = self.settings, self.state, self.settings.max_train_steps
        if state.step and stop.agreed():
            return False
        # Where the curve begins, or what was due when the run was stopped.
        if self.is_time_for(settings.validation_steps) and not self.validator.is_done(state.step):
            self.validator.run(state.step, videos=state.step > 0)
        progress = tqdm(
            initial=state.step, total=last, desc="train", unit="step", dynamic_ncols=True,
            disable=not (self.accelerator.is_main_process and sys.stderr.isatty()),
        )  # fmt: skip
        with progress:
            while state.step < last:
                tokens, flops = self.train_step()
                progress.update()
                if self.clock.step(tokens, flops):
                    self.wait_for_device()
                    self.clock.read()  # rates begin here, when the warm-up's work is done

                if self.is_time_for(settings.logging_steps):
                    progress.set_postfix_str(self.write_log_line())

                stopping = stop.agreed()
                self.wait_for_device(self.is_time_for(settings.checkpointing_steps, settings.validation_steps))
                self.clock.pause()
                # The checkpoint comes first: whatever goes wrong in validation costs no training.
                if stopping or self.is_time_for(settings.checkpointing_steps):
                    state.save()
                if stopping:
                    return False  # what else is due here, the next run does
                if self.is_time_for(settings.validation_steps):
                    self.validator.run(state.step)
                self.clock.resume()
        return True

    def is_time_for(self, *intervals: int) -> bool:
        """True at multiples of an interval of more than 0 steps, and at the end."""
        step, last = self.state.step, self.settings.max_train_steps
        return any(interval and (step % interval == 0 or step == last) for interval in intervals)

    def train_step(self) -> tuple[int, float]:
        """One optimizer step, in which nothing waits for the device.

        Returns its video tokens and its operations (0 if unknown), over all processes.
        """
        settings, state, objective = self.settings, self.state, self.objective
        micro_steps = settings.gradient_accumulation_steps
        means, sample_ids, tokens, flops = [], [], 0, 0.0
        for micro_step in range(micro_steps):
            with self.clock.waiting_for_data():
                batch = next(self.batches)
            # What draws from a global generator (after the loader, which does) is a function of the step as well.
            seed_everything(settings.seed, state.step, micro_step, self.accelerator.process_index)
            # A sample's slot is its place in the whole optimizer step: four micro-steps of one sample draw what one
            # micro-step of four draws.
            slots = micro_step * state.samples_per_micro_step + batch["slots"]
            rng = SampleRandom(settings.seed, state.step, slots, self.accelerator.device)
            take = self.step_graph or partial(self.micro_step, is_last=micro_step == micro_steps - 1)
            values, encoded = take(batch, rng)
            means.append(values)
            sample_ids += batch["sample_ids"]
            tokens += objective.num_video_tokens(encoded.latents)
            flops += self.flops_of(encoded)
        state.advance()

        values = mean_of_dicts(means)
        state.guard.note(state.step, sample_ids, values["loss"], values["grad_norm"])
        state.means.add(values)
        return tokens * self.accelerator.num_processes, flops * self.accelerator.num_processes

    def micro_step(
        self, batch: dict[str, Any], rng: SampleRandom, is_last: bool = True
    ) -> tuple[dict[str, Tensor], EncodedBatch]:
        """Loss and gradients of a micro-batch, after the last of a step the optimizer's work.

        Returns scalars (loss, the objective's metrics, after the last the gradient's norm), and the encoded batch.
        """
        encoded = self.objective.encoder.encode(batch, rng)
        self.batch_shape = tuple(encoded.latents.shape)  # for what is said when memory runs out
        # Processes average their gradients once, at the last micro-step.
        with nullcontext() if is_last else self.accelerator.no_sync(self.objective.module):
            loss, values = self.objective.loss(encoded, rng)
            self.accelerator.backward(loss / self.settings.gradient_accumulation_steps)
        values = {"loss": loss.detach(), **values}
        return values | ({"grad_norm": self.state.optimizer_step()} if is_last else {}), encoded

    def flops_of(self, encoded: EncodedBatch) -> float:
        if self.peak_flops is None:
            return 0.0
        shape = tuple(encoded.latents.shape)
        if shape not in self.flops_by_shape:
            self.flops_by_shape[shape] = self.objective.step_flops(encoded)
        return self.flops_by_shape[shape] or 0.0

    def write_log_line(self) -> str:
        """Waits for the device, stops at a loss that is not finite, logs. Returns the line for the progress bar."""
        state = self.state
        state.guard.check(self.accelerator)
        means = state.means.read(self.accelerator)
        rates = self.clock.read()
        mfu = None
        if self.peak_flops and rates["flops_per_s"]:
            mfu = rates["flops_per_s"] / (self.peak_flops * self.accelerator.num_processes)
        values = {
            "loss": means.pop("loss"),
            "grad_norm": means.pop("grad_norm"),
            "lr": state.learning_rate,
            "s_per_step": rates["s_per_step"],
            "data_wait": rates["data_wait"],
            "video_tokens_per_s": rates["tokens_per_s"],
            "mfu": mfu,
            "peak_memory_gib": peak_memory_gib(self.accelerator.device),
            **means,
        }
        self.log.write(state.step, values)
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        logger.info("step %d/%d  %s", state.step, self.settings.max_train_steps, line)
        return f"loss {values['loss']:.4f}"

    def wait_for_device(self, condition: bool = True) -> None:
        if condition and self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)

    def out_of_memory_advice(self) -> str:
        return training_advice(self.settings, self.batch_shape, self.accelerator.is_fsdp2)


def mean_of_dicts(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every name over the dicts that have it."""
    names = sorted({name for values in dicts for name in values})
    return {n: torch.stack([v[n].detach().float() for v in dicts if n in v]).mean() for n in names}


def check_shared(found: str) -> None:
    """UserError unless every process `found` the same in the output directory: else each would go on from its own."""
    everywhere = sorted(set(gather_object([found])))
    if len(everywhere) > 1:
        raise UserError(
            f"output_dir: some processes see {' there, others '.join(everywhere)}; it has to be on a disk that all "
            "machines share"
        )


def check_writable(output_dir: Path) -> None:
    """Makes the output directory and refuses one that cannot be written, before any model is loaded."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=".writable-", suffix=f".{os.getpid()}"):
            pass
    except OSError as error:
        reason = f"{output_dir} cannot be written ({error.strerror})"
        raise UserError(f"output_dir: {reason}; choose another directory") from error
