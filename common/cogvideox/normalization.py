"""adaLN with one timestep a latent frame. Given one timestep a sample, each class is diffusers' own, bit for bit.

Shapes: B batch, F latent frames, S tokens per latent frame, L text tokens, D model width, E time embedding width.
"""

import torch
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero


def _per_token(modulation: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[B,F,D] → [B,F·S,D]: the modulation of its frame for every token (a view until something reads it)."""
    batch, frames, width = modulation.shape
    return modulation[:, :, None].expand(batch, frames, num_tokens // frames, width).reshape(batch, -1, width)


class FrameLayerNormZero(CogVideoXLayerNormZero):
    """`CogVideoXLayerNormZero` that also takes `temb` [B,F,E].

    Video tokens are shifted, scaled and gated by their own frame's timestep, the other tokens (text, control)
    by the last frame's: the noisiest, which diffusion forcing with a rising ramp always has at its end.
    """

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B,F·S,D], [B,L,D], [B,E] or [B,F,E] → both normalised, then their gates."""
        if temb.ndim == 2:
            return super().forward(hidden_states, encoder_hidden_states, temb)
        modulation = self.linear(self.silu(temb))  # [B,F,6·D]
        num_tokens = hidden_states.shape[1]
        shift, scale, gate = (_per_token(m, num_tokens) for m in modulation.chunk(6, dim=-1)[:3])
        enc_shift, enc_scale, enc_gate = (m[:, -1:] for m in modulation.chunk(6, dim=-1)[3:])  # [B,1,D]
        hidden_states = self.norm(hidden_states) * (1 + scale) + shift
        encoder_hidden_states = self.norm(encoder_hidden_states) * (1 + enc_scale) + enc_shift
        return hidden_states, encoder_hidden_states, gate, enc_gate


class FrameAdaLayerNorm(AdaLayerNorm):
    """The output norm of CogVideoX, also for `temb` [B,F,E]."""

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor | None = None, temb: torch.Tensor | None = None
    ) -> torch.Tensor:
        if temb is None or temb.ndim == 2:
            return super().forward(x, timestep, temb)
        shift, scale = self.linear(self.silu(temb)).chunk(2, dim=-1)  # [B,F,D] each
        return self.norm(x) * (1 + _per_token(scale, x.shape[1])) + _per_token(shift, x.shape[1])
