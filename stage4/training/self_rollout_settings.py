"""Settings of stage 4's second part, and which values go together."""

import os
from dataclasses import dataclass

from common.config.errors import SettingError
from common.config.fields import PathSetting
from common.training.objective import Objective
from stage4.training.scm_settings import SCMSettings


@dataclass
class SelfRolloutSettings(SCMSettings):
    """Settings of self-rollout: stage 4's, and its own.

    Of stage 4's, what is for distillation alone is refused. `num_solver_steps` is that of the validation loss, and goes
    into the exported scheduler.
    """

    ema_decay: float = 0.99  # decay per step of the student's average
    key_press_share: float = 0.0  # of distillation alone
    student_model_name_or_path: PathSetting = ""  # stage 4's output_dir, the student to go on from
    critic_learning_rate: float = 2e-5  # peak learning rate of the critic, which has to keep up with the student;
    # max_grad_norm holds for both gradients together
    rollouts_per_stream: float = 24.0  # mean number of steps, each of a window's frames, before a stream begins anew
    live_share: float = 0.5  # share of streams that are told the newest signal for all frames in noise
    held_share: float = 0.5  # share of streams that hold one signal for as long as they last
    learnt_share: float = 0.5  # share of the average in what is exported; the rest is the student as it was (WiSE-FT,
    # arXiv 2109.01903). Sample videos are of the average alone

    def validate(self) -> None:
        super().validate()
        distillation = "is for distillation, which this is not"
        self.refuse_changed(distillation, "huber_c", "uniform_timestep_share", "control_dropout")
        self.refuse_changed("is for distillation; of streams live_share are", "key_press_share")
        self.refuse_changed("is for distillation; here students are whole, of fixed guidance", "rank", "cond_proj_dim")
        if self.optimizer == "muon":
            raise SettingError("optimizer", "is 'muon'; self-rollout, with two rates, needs 'adamw' or 'adamw_8bit'")
        self.refuse_changed("is for distillation; streams deviate by themselves", "offset_noise")
        for name in ("height_buckets", "width_buckets"):
            if len(getattr(self, name)) > 1:
                raise SettingError(name, f"is {getattr(self, name)}; streams that go on have one size: give one")
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
        student = self.student_model_name_or_path
        if not os.path.isdir(student):
            what = f"{student} is no directory" if student else "is not set"
            raise SettingError("student_model_name_or_path", f"{what}; give the output_dir of stage 4's distillation")
        if os.path.realpath(student) == os.path.realpath(self.output_dir):
            raise SettingError("output_dir", f"{student} is the student to go on from; choose another directory")

    def starting_models(self) -> list[str]:
        return [*super().starting_models(), self.student_model_name_or_path]

    def build_objective(self) -> Objective:
        from stage4.training.self_rollout import SelfRolloutObjective  # which reads these settings

        return SelfRolloutObjective(self)
