"""CogVideoX's transformer with per-frame timesteps, the control adapter and a guidance embedding.

Shapes: B batch, F latent frames, C latent channels, H W latent height/width, S = H·W/4 tokens per latent frame,
L text tokens, D model width, E time embedding width.
"""

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.embeddings import TimestepEmbedding, get_1d_sincos_pos_embed_from_grid
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from common.cogvideox.attention import CogVideoXDispatchAttnProcessor, control_attention_bias
from common.cogvideox.control_adapter import ControlBlock, make_control_embedding
from common.cogvideox.normalization import FrameAdaLayerNorm, FrameLayerNormZero

CONTROL_PREFIXES = ("control_embedding.", "control_blocks.")


def all_blocks(transformer: nn.Module) -> tuple[nn.Module, ...]:
    """The base blocks and control blocks of a CogVideoX transformer, diffusers' or ours."""
    return (*transformer.transformer_blocks, *(getattr(transformer, "control_blocks", None) or ()))


class CogVideoXControlTransformer3DModel(CogVideoXTransformer3DModel):
    """`CogVideoXTransformer3DModel` (1.0) that denoises every latent frame at its own timestep and obeys a signal.

    With `control_dim=None`, `cond_proj_dim=None` and one timestep a sample it equals diffusers' class bit for bit.

    Args (diffusers' own, and):
        control_dim: width of a control signal's row; None leaves the adapter out.
        control_start_layer, control_end_layer: a control block follows each base block in [start, end).
        control_zero_init: a new adapter changes nothing before it is trained.
        control_attention: "token_causal" (published) or "frame_causal"; see `control_attention_bias`.
        control_temporal_position: queries and keys of control attention carry their frame's position.
        control_tokens_per_frame: K; with more than one, what a signal adds may differ over the picture while it holds.
        cond_proj_dim: width of the guidance-scale embedding (latent consistency models, arXiv 2310.04378).
    The defaults are the published form, so that a config.json without these fields loads as published.
    """

    _repeated_blocks = ["CogVideoXBlock", "ControlBlock"]
    _no_split_modules = ["CogVideoXBlock", "CogVideoXPatchEmbed", "ControlBlock"]
    _cp_plan = {  # see context_parallel.py; both take [·,F,S,·]
        "divide_tokens": {"input": ContextParallelInput(split_dim=2)},
        "gather_tokens": ContextParallelOutput(gather_dim=2),
    }

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int | None = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
        control_dim: int | None = None,
        control_start_layer: int = 15,
        control_end_layer: int = 30,
        control_zero_init: bool = True,
        control_attention: str = "token_causal",
        control_temporal_position: bool = False,
        control_tokens_per_frame: int = 1,
        cond_proj_dim: int | None = None,
    ):
        if patch_size_t is not None or ofs_embed_dim is not None:
            raise ValueError(
                "CogVideoX 1.5 (patch_size_t, ofs_embed_dim) is not supported; use CogVideoX 1.0, 2B or 5B"
            )
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            flip_sin_to_cos=flip_sin_to_cos,
            freq_shift=freq_shift,
            time_embed_dim=time_embed_dim,
            text_embed_dim=text_embed_dim,
            num_layers=num_layers,
            dropout=dropout,
            attention_bias=attention_bias,
            sample_width=sample_width,
            sample_height=sample_height,
            sample_frames=sample_frames,
            patch_size=patch_size,
            temporal_compression_ratio=temporal_compression_ratio,
            max_text_seq_length=max_text_seq_length,
            activation_fn=activation_fn,
            timestep_activation_fn=timestep_activation_fn,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            spatial_interpolation_scale=spatial_interpolation_scale,
            temporal_interpolation_scale=temporal_interpolation_scale,
            use_rotary_positional_embeddings=use_rotary_positional_embeddings,
            use_learned_positional_embeddings=use_learned_positional_embeddings,
            patch_bias=patch_bias,
        )
        dim = num_attention_heads * attention_head_dim
        self._patch_per_frame_norms(dim, time_embed_dim, norm_elementwise_affine, norm_eps)
        if cond_proj_dim is not None:
            self.time_embedding = TimestepEmbedding(
                dim, time_embed_dim, timestep_activation_fn, cond_proj_dim=cond_proj_dim
            )
            nn.init.zeros_(self.time_embedding.cond_proj.weight)  # starts as the model without the embedding
        self.control_embedding = self.control_blocks = None
        if control_dim is not None:
            self._add_control_adapter(dim)
        self.set_attn_processor(self._default_attn_processors())
        self.divide_tokens, self.gather_tokens = nn.Identity(), nn.Identity()  # where context parallelism takes hold

    def _patch_per_frame_norms(self, dim: int, time_embed_dim: int, affine: bool, eps: float) -> None:
        """Replaces adaLN by classes with the same parameters that also take one timestep a frame."""
        for block in self.transformer_blocks:
            block.norm1 = FrameLayerNormZero(time_embed_dim, dim, affine, eps)
            block.norm2 = FrameLayerNormZero(time_embed_dim, dim, affine, eps)
        self.norm_out = FrameAdaLayerNorm(
            time_embed_dim, output_dim=2 * dim, norm_elementwise_affine=affine, norm_eps=eps, chunk_dim=1
        )

    def _add_control_adapter(self, dim: int) -> None:
        config = self.config
        start, end, num_tokens = config.control_start_layer, config.control_end_layer, config.control_tokens_per_frame
        if not 0 <= start < end <= config.num_layers:
            raise ValueError(
                f"control layers [{start}, {end}) do not lie within the model's {config.num_layers} layers"
            )
        if num_tokens < 1:
            raise ValueError(f"control_tokens_per_frame must be 1 or more, got {num_tokens}")
        sizes = config.num_attention_heads, config.attention_head_dim, config.time_embed_dim, config.norm_eps
        self.control_embedding = make_control_embedding(config.control_dim, dim, num_tokens)
        self.control_blocks = nn.ModuleList(
            ControlBlock(dim, *sizes, config.control_zero_init) for _ in range(start, end)
        )

    def _default_attn_processors(self) -> dict:
        return {
            name: processor if name.startswith("control_blocks") else CogVideoXDispatchAttnProcessor()
            for name, processor in self.attn_processors.items()
        }

    def set_attn_processor(self, processor: Any) -> None:
        """As in diffusers; a single processor is for self-attention, and control attention keeps its own."""
        if not isinstance(processor, dict):
            processor = {
                name: own if name.startswith("control_blocks") else processor
                for name, own in self.attn_processors.items()
            }
        super().set_attn_processor(processor)

    @classmethod
    def from_transformer(
        cls, base: CogVideoXTransformer3DModel, **changes: Any
    ) -> "CogVideoXControlTransformer3DModel":
        """The same weights in a model whose config differs by `changes` (control_dim, cond_proj_dim, …).

        New modules are initialised as in a new model; a changed shape of an old one is an error.
        """
        config = {key: value for key, value in base.config.items() if not key.startswith("_")}
        default = torch.get_default_dtype()
        torch.set_default_dtype(base.dtype)  # or the GPU would for a moment hold a whole model in float32
        try:
            with torch.device(base.device):
                model = cls(**{**config, **changes})
        finally:
            torch.set_default_dtype(default)
        nn.Module.to(model, base.dtype)  # diffusers' own `to` warns of an empty list of float32 modules
        missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
        new = (*CONTROL_PREFIXES, "time_embedding.cond_proj.")
        assert not unexpected and all(key.startswith(new) for key in missing), (missing, unexpected)
        return model

    def control_parameters(self) -> list[nn.Parameter]:
        """Parameters of the Interactive Module, which stage 2 adds."""
        return [p for name, p in self.named_parameters() if name.startswith(CONTROL_PREFIXES)]

    def _time_embedding(self, timestep: torch.Tensor, timestep_cond: torch.Tensor | None, dtype: torch.dtype):
        """[B] → [B,E], [B,F] → [B,F,E]."""
        projected = self.time_proj(timestep.flatten()).to(dtype=dtype)  # sinusoids are float32 always
        if timestep.ndim == 2:
            projected = projected.unflatten(0, timestep.shape)  # [B,F,D]
            timestep_cond = None if timestep_cond is None else timestep_cond[:, None]
        return self.time_embedding(projected, timestep_cond)

    def _control_inputs(self, control_embeds: torch.Tensor, tokens_per_frame: int, dtype: torch.dtype) -> tuple:
        """[B,F,control_dim] → control tokens [B,F·K,D], bias [F·S,F·K], frame positions [F,D] or None."""
        num_frames, device = control_embeds.shape[1], control_embeds.device
        num_tokens = self.config.control_tokens_per_frame
        bias = control_attention_bias(
            num_frames, tokens_per_frame, self.config.control_attention, device=device, dtype=dtype
        )
        position = None
        if self.config.control_temporal_position:
            dim = self.config.num_attention_heads * self.config.attention_head_dim
            position = get_1d_sincos_pos_embed_from_grid(dim, torch.arange(num_frames, device=device)).to(dtype)
        bias = self._own_tokens(bias[None], num_frames)[0].repeat_interleave(num_tokens, dim=1)
        tokens = self.control_embedding(control_embeds.to(dtype)).unflatten(-1, (num_tokens, -1))  # [B,F,K,D]
        return tokens.flatten(1, 2), bias, position

    def _own_tokens(self, tokens: torch.Tensor, num_frames: int) -> torch.Tensor:
        """[·,F·S,·] → [·,F·Sₚ,·]: of every frame the tokens that this process has; all, without context parallelism."""
        return self.divide_tokens(tokens.unflatten(1, (num_frames, -1))).flatten(1, 2)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        control_embeds: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts v.

        Args:
            hidden_states: noisy latents [B,F,C,H,W].
            encoder_hidden_states: text embeddings [B,L,text_embed_dim].
            timestep: [B], or [B,F] for one a latent frame.
            control_embeds: [B,F,control_dim]; None skips the control blocks (the model as of stage 1, if every
                run of stage 2 trained the adapter alone).
            timestep_cond: guidance-scale embedding [B,cond_proj_dim].

        Returns:
            [B,F,out_channels,H,W].
        """
        batch_size, num_frames, _, height, width = hidden_states.shape
        p = self.config.patch_size
        tokens_per_frame = (height // p) * (width // p)
        temb = self._time_embedding(timestep, timestep_cond, hidden_states.dtype)

        control, num_text_tokens = None, encoder_hidden_states.shape[1]
        if control_embeds is not None:
            if self.control_blocks is None:
                raise ValueError("control_embeds were given to a transformer without control_dim")
            control = self._control_inputs(control_embeds, tokens_per_frame, hidden_states.dtype)

        tokens = self.embedding_dropout(self.patch_embed(encoder_hidden_states, hidden_states))  # [B,L+F·S,D]
        text = self._own_tokens(tokens[:, :num_text_tokens], 1)
        video = self._own_tokens(tokens[:, num_text_tokens:], num_frames)
        if image_rotary_emb is not None:
            image_rotary_emb = tuple(self._own_tokens(table[None], num_frames)[0] for table in image_rotary_emb)
        for layer, block in enumerate(self.transformer_blocks):
            video, text = self._run(block, video, text, temb, image_rotary_emb, attention_kwargs)
            if control is not None and self.config.control_start_layer <= layer < self.config.control_end_layer:
                control_block = self.control_blocks[layer - self.config.control_start_layer]
                control_tokens, bias, position = control
                video = self._run(control_block, video, control_tokens, temb, bias, position)

        video = self.proj_out(self.norm_out(self.norm_final(video), temb=temb))  # [B,F·S,C·p·p]
        video = self.gather_tokens(video.unflatten(1, (num_frames, -1)))
        output = video.reshape(batch_size, num_frames, height // p, width // p, -1, p, p)
        output = output.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # [B,F,C,H,W]
        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)
