"""Settings of stage 4, and which values go together."""

from dataclasses import dataclass, field

from common.config.errors import SettingError
from common.training.cogvideox_objective import TRAIN_TIMESTEPS
from common.training.controlled_objective import StreamingSettings
from common.training.lora import SettingsWithLora
from common.training.objective import Objective


@dataclass
class SCMSettings(SettingsWithLora, StreamingSettings):
    """Settings of stage 4. With a rank the student is a LoRA, over the base as the teacher; else a whole copy of it."""

    phases_per_group: int = 1  # m: forwards per window shift of the distilled model
    num_solver_steps: int = 40  # K: the teacher's step spans T/K timesteps
    teacher_guidance_scale: float = 6.0  # the teacher's guidance on text, which the student learns; 1 for none
    teacher_control_guidance_scale: float = 3.0  # the teacher's guidance on control; 1 for none
    guidance_range: list[float] = field(default_factory=list)  # [low, high] to draw one scale for both from, instead
    cond_proj_dim: int | None = None  # width of the embedding that tells the student the guidance drawn
    key_press_share: float = 0.5  # share of samples told another signal than the footage's for all frames in noise:
    # what a player does to frames that are half made, and footage never shows
    huber_c: float = 0.01  # pseudo-Huber: quadratic below, linear above
    ema_decay: float = 0.95  # decay per step of the target's weights, which are also what is exported

    def validate(self) -> None:
        super().validate()
        steps = "does nothing here: a distilled model takes phases_per_group steps a shift"
        self.refuse_changed(steps, "validation_num_inference_steps")
        phases = self.num_noise_groups * self.phases_per_group
        if self.phases_per_group < 1:
            raise SettingError("phases_per_group", f"must be 1 or more, got {self.phases_per_group}")
        if self.num_solver_steps < phases or self.num_solver_steps % phases:
            below = max(self.num_solver_steps // phases, 1) * phases
            raise SettingError(
                "num_solver_steps",
                f"{self.num_solver_steps} is not a multiple of the {phases} phases "
                f"(num_noise_groups × phases_per_group); use {below} or {below + phases}",
            )
        if TRAIN_TIMESTEPS % phases or TRAIN_TIMESTEPS % self.num_solver_steps:
            raise SettingError(
                "num_solver_steps",
                f"{self.num_solver_steps} solver steps and {phases} phases (num_noise_groups × phases_per_group) must "
                f"both divide the {TRAIN_TIMESTEPS} timesteps, as 40 and 4 do",
            )
        if not 0 <= self.ema_decay < 1:
            raise SettingError("ema_decay", f"must be at least 0 and less than 1, got {self.ema_decay}")
        if not 0 <= self.key_press_share <= 1:
            raise SettingError("key_press_share", f"must lie between 0 and 1, got {self.key_press_share}")
        if self.huber_c <= 0:
            raise SettingError("huber_c", f"must be more than 0, got {self.huber_c}")
        for name in ("teacher_guidance_scale", "teacher_control_guidance_scale"):
            if not getattr(self, name) >= 1:
                raise SettingError(name, f"must be 1, for none, or more, got {getattr(self, name)}")
        given = self.guidance_range
        if bool(given) != (self.cond_proj_dim is not None):
            raise SettingError("guidance_range", "goes together with cond_proj_dim: set both or neither")
        if given and not (len(given) == 2 and 1 <= given[0] <= given[1]):
            raise SettingError("guidance_range", f"must be [low, high], 1 ≤ low ≤ high, got {given}")
        if self.rank and self.cond_proj_dim is not None:
            raise SettingError(
                "cond_proj_dim",
                "adds a layer that is trained as a whole; with a LoRA as student (rank) it must be None",
            )

    def build_objective(self) -> Objective:
        from stage4.training.scm import SCMObjective  # which reads these settings
        from stage4.training.scm_lora import LoraSCMObjective

        return LoraSCMObjective(self) if self.rank else SCMObjective(self)
