"""Settings of stage 4's second part, and which values go together."""

from dataclasses import dataclass

from common.config.errors import SettingError
from common.config.fields import PathSetting
from common.training.objective import Objective
from stage4.training.scm_settings import SCMSettings


@dataclass
class SelfRolloutSettings(SCMSettings):
    """Settings of self-rollout: stage 4's, of which the solver's and the Huber constant have no effect here."""

    student_model_name_or_path: PathSetting = ""  # stage 4's output_dir, the student to go on from
    critic_learning_rate: float = 2e-5  # peak learning rate of the critic, which has to keep up with the student
    rollouts_per_stream: float = 24.0  # mean number of steps, each of a window's frames, before a stream begins anew
    live_share: float = 0.5  # share of streams that are told the newest signal for all frames in noise
    held_share: float = 0.5  # share of streams that hold one signal for as long as they last
    learnt_share: float = 0.5  # of the exported weights; the rest is the student as it was (WiSE-FT, arXiv 2109.01903)

    def validate(self) -> None:
        super().validate()
        if self.rank or self.cond_proj_dim is not None:
            name = "rank" if self.rank else "cond_proj_dim"
            raise SettingError(name, "is for distillation; self-rollout trains whole students of fixed guidance")
        if self.optimizer != "adamw":
            raise SettingError("optimizer", f"is {self.optimizer!r}; self-rollout, with two rates, needs 'adamw'")
        if self.gradient_accumulation_steps != 1:
            raise SettingError("gradient_accumulation_steps", "must be 1: streams go on from step to step")
        if not self.critic_learning_rate > 0:
            raise SettingError("critic_learning_rate", f"must be more than 0, got {self.critic_learning_rate}")
        if not self.rollouts_per_stream >= 1:
            raise SettingError("rollouts_per_stream", f"must be 1 or more, got {self.rollouts_per_stream}")
        for name in ("live_share", "held_share", "learnt_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(name, f"must lie between 0 and 1, got {getattr(self, name)}")

    def check_files(self) -> None:
        super().check_files()
        if not self.student_model_name_or_path:
            raise SettingError(
                "student_model_name_or_path", "is not set; give the output_dir of stage 4's distillation"
            )

    def build_objective(self) -> Objective:
        from stage4.training.self_rollout import SelfRolloutObjective  # which reads these settings

        return SelfRolloutObjective(self)
