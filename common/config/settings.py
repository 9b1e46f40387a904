"""The settings that all four stages share. A stage's own settings derive from `TrainingSettings`.

A config module makes one instance and sets it, name by name::

    args = LoraSettings()
    args.learning_rate = 1e-4  # float: what it does

An unknown name or a wrong type is refused at that line; what cannot go together is refused by `validate`.
Nothing here imports torch, so a mistake is reported at once and not after a minute of imports.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from common.config.command_line import refuse_unwritable
from common.config.errors import SettingError, UserError
from common.config.fields import PathSetting, check_value, describe
from common.config.files import replace_text

VAE_TIME_FACTOR = 4  # raw frames per latent frame after the first
SIZE_MULTIPLE = 16  # 8 pixels per latent pixel, 2 latent pixels per patch

LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
)  # fmt: skip


@functools.cache
def setting_types(settings_class: type) -> dict[str, Any]:
    """Setting name → annotation, of a settings class and its bases."""
    hints = get_type_hints(settings_class, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(settings_class)}


def closest_name(name: str, known: Any) -> str:
    """A hint with the known name nearest to `name`, to put after a complaint; empty when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


@dataclass
class TrainingSettings:
    """Settings of a training run; defaults are those of CogVideoX-2B on GPUs of 80 GB. Subclasses add their
    stage's."""

    # --- model and output
    pretrained_model_name_or_path: PathSetting = ""  # pipeline directory (or hub id) to start from
    output_dir: PathSetting = ""  # the run's directory; becomes a complete pipeline directory at the end
    seed: int = 42  # of everything drawn: weights, data order, windows, noise, timesteps, dropout

    # --- data
    data_root: PathSetting = ""  # directory that the index's video paths are relative to
    index_file: PathSetting = ""  # index of clips; its forms are in data/README.md
    validation_index_file: PathSetting = ""  # index of held-out clips; "" holds out the end of index_file
    num_validation_clips: int = 8  # clips in the fixed validation batch; 0 for none
    height_buckets: list[int] = field(default_factory=lambda: [480])  # heights in pixels, multiples of 16
    width_buckets: list[int] = field(default_factory=lambda: [720])  # widths in pixels, multiples of 16
    frame_buckets: list[int] = field(default_factory=lambda: [33])  # raw frames of a training clip, 4n+1
    fps: int = 16  # frames per second that the model sees; videos of any higher rate are resampled by time
    windows_per_clip: int = 0  # 0: a fresh random window at each draw; K: K fixed ones, as a cache needs
    dataloader_num_workers: int = 4  # processes that decode videos; 0 decodes in the training process
    max_unreadable_share: float = 0.01  # stop when more than this share of the videos seen cannot be read
    latent_cache_dir: PathSetting = ""  # directory made by common.tools.precompute; "" encodes while training
    max_sequence_length: int = 226  # text tokens per caption (the model's max_text_seq_length)
    caption_dropout: float = 0.1  # share of samples trained without caption, for guidance

    # --- optimisation
    train_batch_size: int = 1  # samples per process and micro-step
    gradient_accumulation_steps: int = 1  # micro-steps per optimizer step
    max_train_steps: int = 100_000  # optimizer steps of the whole run
    optimizer: str = "adamw"  # "adamw_8bit": moments in 2 bytes a weight instead of 8; "muon": orthogonal steps for
    # weight matrices, AdamW for the rest, not with FSDP
    trained_weights: str = "float32"  # or "bfloat16", rounded stochastically: half the memory, with "adamw_8bit" alone
    step_in_backward: bool = False  # with "adamw_8bit" on one GPU: a weight takes its step as soon as its gradient is
    # there, so gradients take no memory; each weight's step is bounded instead, and max_grad_norm has no effect
    learning_rate: float = 1e-5  # peak learning rate
    lr_scheduler: str = "constant_with_warmup"  # diffusers' name of the learning rate's course
    lr_warmup_steps: int = 200  # optimizer steps over which the learning rate rises from zero
    adam_beta1: float = 0.9  # AdamW: decay of the first moment
    adam_beta2: float = 0.95  # AdamW: decay of the second moment
    adam_epsilon: float = 1e-8  # AdamW: keeps the division finite
    weight_decay: float = 1e-3  # AdamW: decoupled weight decay
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    mixed_precision: str = "bf16"  # "bf16": frozen weights and products in bfloat16; "no": all float32
    # int first: a "1" on the launch line is one block and no word for True
    gradient_checkpointing: int | bool = True  # blocks that recompute activations in the backward pass, spread evenly:
    # True for all, False for none, or how many; the more, the less memory and the slower
    activation_budget: float = 1.0  # with compile: share of its activations that a block which does not recompute keeps
    # for the backward pass; what is cheapest to compute again is dropped first
    compile: bool = False  # compile each transformer block: faster steps after a minute or two of compiling
    cuda_graph: bool = False  # record the step once and replay it: for small models on one GPU, with cached latents

    # --- checkpoints and logs
    checkpointing_steps: int = 500  # optimizer steps between checkpoints
    checkpoints_total_limit: int | None = 3  # oldest checkpoints beyond this many are deleted; None keeps all
    resume_from_checkpoint: Annotated[str, "path", "latest", "none"] = "latest"  # or a directory
    report_to: str = "tensorboard"  # "tensorboard", "wandb" or "none"; the JSONL log is always written
    logging_steps: int = 10  # optimizer steps between log lines

    # --- validation
    validation_steps: int = 500  # optimizer steps between validations; 0 for none
    validation_prompts: list[str] = field(default_factory=list)  # one sample video for each; [] for none
    validation_control: str = ""  # control string of the sample videos: "D*32,DL*16", token*raw frames
    validation_num_inference_steps: int = 20  # denoising steps of the sample videos

    def __setattr__(self, name: str, value: Any) -> None:
        known = setting_types(type(self))
        if name not in known:
            raise UserError(f"unknown setting {name!r}{closest_name(name, known)}")
        try:
            value = check_value(known[name], value)
        except TypeError:
            got = f"{value!r} ({type(value).__name__})"
            raise SettingError(name, f"must be {describe(known[name])}, got {got}") from None
        object.__setattr__(self, name, value)

    def validate(self) -> None:
        """Refuse impossible values and combinations (SettingError). Subclasses call this first, then check
        their own."""
        self._check_ranges()
        self._check_choices()
        self._check_buckets()
        if self.cuda_graph:
            form = "needs {}; a recorded step has no other form"
            self._require("cuda_graph", form, gradient_checkpointing=False, gradient_accumulation_steps=1)
            if self.optimizer == "adamw_8bit":
                raise SettingError("cuda_graph", "needs optimizer = 'adamw' or 'muon'; 'adamw_8bit' cannot be recorded")
            if not self.latent_cache_dir:
                raise SettingError("cuda_graph", "needs latent_cache_dir; encoding videos cannot be recorded")
        self._check_precision()
        if self.latent_cache_dir and self.windows_per_clip == 0:
            raise SettingError("latent_cache_dir", "a cache holds fixed windows; set windows_per_clip to 1 or more")

    def check_files(self) -> None:
        """Refuse a run whose inputs are not there or whose output cannot be written. `--dry_run` does
        without."""
        for name in ("pretrained_model_name_or_path", "output_dir", "data_root", "index_file"):
            if not getattr(self, name):
                raise SettingError(name, "is not set; give a path in the config or on the launch line")
        base = self.pretrained_model_name_or_path
        if os.path.isabs(base) and not os.path.isdir(base):  # what is not absolute is a hub id
            what = "give a pipeline directory or a hub id (org/name)"
            raise SettingError("pretrained_model_name_or_path", f"{base} is no directory; {what}")
        if os.path.realpath(base) == os.path.realpath(self.output_dir):
            raise SettingError(
                "output_dir", f"{self.output_dir} is the model that the run starts from; choose another directory"
            )
        if not os.path.isdir(self.data_root):
            raise SettingError("data_root", f"{self.data_root} is no directory; give the one that holds the videos")
        for name in ("index_file", "validation_index_file"):
            if getattr(self, name) and not os.path.exists(getattr(self, name)):
                raise SettingError(
                    name, f"{getattr(self, name)} does not exist; data/README.md says what belongs there"
                )
        refuse_unwritable(self.output_dir, "output_dir")

    def window_sizes(self) -> list[int]:
        """Raw frames of what a forward gets."""
        return self.frame_buckets

    def starting_models(self) -> list[str]:
        """Every directory or hub id whose weights the run starts from."""
        return [self.pretrained_model_name_or_path]

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as plain values that JSON can hold."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the settings as JSON, beside and renamed, so that a killed run never leaves half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def build_objective(self) -> Any:
        """The stage's objective, which holds its models and its loss. Each stage's settings say which."""
        raise NotImplementedError(f"{type(self).__name__} names no objective")

    def _check_ranges(self) -> None:
        positive = (
            "fps", "max_sequence_length", "train_batch_size", "gradient_accumulation_steps",
            "max_train_steps", "learning_rate", "adam_epsilon", "max_grad_norm", "checkpointing_steps",
            "logging_steps", "validation_num_inference_steps",
        )  # fmt: skip
        at_least_zero = (
            "num_validation_clips", "windows_per_clip", "dataloader_num_workers", "lr_warmup_steps",
            "weight_decay", "validation_steps", "seed", "gradient_checkpointing",
        )  # fmt: skip
        for name in positive:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise SettingError(name, f"must be more than 0, got {getattr(self, name)}")
        for name in at_least_zero:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise SettingError(name, f"must be 0 or more, got {getattr(self, name)}")
        for name in ("caption_dropout", "max_unreadable_share", "activation_budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(name, f"must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(name, f"must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise SettingError("checkpoints_total_limit", "must be 1 or more, or None to keep all")

    def _check_choices(self) -> None:
        if self.mixed_precision == "fp16":
            raise SettingError("mixed_precision", "'fp16' overflows in the T5 text encoder; use 'bf16' or 'no'")
        for name, choices in (
            ("mixed_precision", ("no", "bf16")),
            ("optimizer", ("adamw", "adamw_8bit", "muon")),
            ("trained_weights", ("float32", "bfloat16")),
            ("lr_scheduler", LR_SCHEDULERS),
            ("report_to", ("tensorboard", "wandb", "none")),
        ):
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(repr, choices))
                raise SettingError(name, f"{getattr(self, name)!r} is not one of {wanted}")

    def _check_precision(self) -> None:
        if self.activation_budget < 1:
            self._require("activation_budget", "needs {}", compile=True)
        if self.trained_weights == "bfloat16":
            self._require("trained_weights", "'bfloat16' needs {}", optimizer="adamw_8bit", mixed_precision="bf16")
        if self.step_in_backward:
            self._require("step_in_backward", "needs {}", optimizer="adamw_8bit", gradient_accumulation_steps=1)

    def _require(self, setting: str, message: str, **needed: Any) -> None:
        """SettingError about `setting` unless the others are as it needs them; the message's {} names one that is
        not."""
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise SettingError(setting, message.format(f"{name} = {value!r}"))

    def refuse_changed(self, why: str, *names: str) -> None:
        """SettingError for the first of `names` that has another value than its default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise SettingError(name, f"{why}; leave it at {defaults[name]!r}")

    def _check_buckets(self) -> None:
        for name in ("frame_buckets", "height_buckets", "width_buckets"):
            values = getattr(self, name)
            if not values:
                raise SettingError(name, "is empty; give at least one value")
            if len(set(values)) != len(values):
                raise SettingError(name, f"{values} names a value twice")
        for frames in self.frame_buckets:
            if frames < VAE_TIME_FACTOR + 1 or (frames - 1) % VAE_TIME_FACTOR:
                below = max((frames - 1) // VAE_TIME_FACTOR, 1) * VAE_TIME_FACTOR + 1
                right = f"{below} or {below + VAE_TIME_FACTOR}"
                raise SettingError("frame_buckets", f"{frames} frames is not 4n+1; use {right}")
        for name in ("height_buckets", "width_buckets"):
            for size in getattr(self, name):
                if size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
                    below = max(size // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE
                    right = f"{below} or {below + SIZE_MULTIPLE}"
                    raise SettingError(name, f"{size} is not a multiple of {SIZE_MULTIPLE}; use {right}")
