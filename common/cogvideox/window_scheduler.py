"""What the schedulers of a sliding window share; the schedulers themselves are in scheduler.py.

Shapes: B batch, F latent frames, G noise groups, W frames per group, T train timesteps, N inference steps.
"""

import torch
from torch import Tensor

from common.cogvideox import noise_schedule
from common.cogvideox.noise_schedule import CLEAN
from common.config.errors import UserError


class SwinSchedulerMixin:
    """What the three schedulers share: the window, ᾱ with a clean end, noising in float32, the grid's predecessors."""

    is_distilled = False  # whether the number of inference steps is the model's own (stage 4)

    def _check_window(self) -> None:
        config = self.config
        if config.num_noise_groups < 1 or config.frames_per_group < 1:
            raise UserError(
                f"num_noise_groups={config.num_noise_groups} and frames_per_group={config.frames_per_group} "
                "have to be at least 1"
            )
        if config.num_train_timesteps % config.num_noise_groups:
            raise UserError(
                f"num_noise_groups={config.num_noise_groups} does not divide "
                f"num_train_timesteps={config.num_train_timesteps}"
            )
        if config.prediction_type != "v_prediction" or not config.set_alpha_to_one:
            raise UserError(
                f"prediction_type={config.prediction_type!r}, set_alpha_to_one={config.set_alpha_to_one}: a window "
                "needs 'v_prediction' (x̂0 is undefined at pure noise otherwise) and True (frames must end clean)"
            )
        self._alpha_tables: dict[torch.device, Tensor] = {}

    @property
    def num_window_frames(self) -> int:
        """F = 1 + G·W, the condition frame included."""
        return 1 + self.config.num_noise_groups * self.config.frames_per_group

    @property
    def default_inference_steps(self) -> int | None:
        """N where none is asked for: the multiple of G that is nearest to 20 (for 8 groups 24); None if distilled."""
        groups = self.config.num_noise_groups
        return None if self.is_distilled else max((2 * 20 + groups) // (2 * groups), 1) * groups

    def alpha_table(self, device: torch.device | str = "cpu") -> Tensor:
        """[T+1] ᾱ and behind it 1 for the clean end (timestep −1); float64. Copied to a device once."""
        device = torch.device(device)
        if device not in self._alpha_tables:
            table = noise_schedule.alphas_with_clean_end(self)
            self._alpha_tables[device] = (table.float() if device.type == "mps" else table).to(device)
        return self._alpha_tables[device]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·x + √(1−ᾱ)·ε for timesteps [B], [B,F] or [B,F,1,1,1]; −1 adds none. float32 even for bf16 samples."""
        device = original_samples.device
        return noise_schedule.mix_noise(original_samples, noise, timesteps.to(device), self.alpha_table(device))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ·ε − √(1−ᾱ)·x, the training target; timesteps and type as in `add_noise`."""
        return noise_schedule.velocity(sample, noise, timesteps.to(sample.device), self.alpha_table(sample.device))

    def previous_timesteps(self, timesteps: Tensor) -> Tensor:
        """The grid's next lower timestep, −1 below the last.

        diffusers subtracts T//N, which is the same when N divides T, and else drifts off the grid and may end noisy.
        """
        self._require_timesteps()
        grid = self.timesteps.to(timesteps.device).flip(0).contiguous()  # rising
        predecessors = torch.cat([torch.full_like(grid[:1], CLEAN), grid])
        return predecessors[torch.searchsorted(grid, timesteps.contiguous())]

    def _require_timesteps(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")

    def _diffusers_can(self, timestep: Tensor | int, *special: object) -> bool:
        """One timestep for all, nothing special asked, and a grid on which diffusers' step size is exact."""
        is_scalar = not isinstance(timestep, Tensor) or timestep.ndim == 0
        self._require_timesteps()
        divides = self.config.num_train_timesteps % self.num_inference_steps == 0
        return is_scalar and divides and all(value is None for value in special)
