"""Attention processors: CogVideoX's joint self-attention through diffusers' dispatcher, and control attention.

Shapes: B batch, F latent frames, S tokens per latent frame, L text tokens, D model width, h heads, d = D/h.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as nnf
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.cogvideox.context_parallel import compiled_attention

NOT_CUDNN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class CogVideoXDispatchAttnProcessor:
    """diffusers' `CogVideoXAttnProcessor2_0`, with the attention product left to `dispatch_attention_fn`.

    diffusers' own processor calls SDPA directly, so `transformer.set_attention_backend("_native_cudnn")`, the
    `attention_backend` context manager and context parallelism pass it by. With the default backend the
    two are equal to the last bit.
    """

    # Set by `set_attention_backend` and by context parallelism; diffusers looks for both names.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video tokens [B,F·S,D] and text tokens [B,L,D] attend to all of both; returns both, in that order."""
        num_text_tokens = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # [B,L+F·S,D]

        query, key, value = (
            projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B,h,L+F·S,d]
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query = _rotate_video_tokens(query, num_text_tokens, image_rotary_emb)
            key = _rotate_video_tokens(key, num_text_tokens, image_rotary_emb)

        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B,L+F·S,h,d]: the dispatcher's layout
        if self._parallel_config is not None and torch.compiler.is_compiling():
            tokens = compiled_attention(query, key, value, self._parallel_config, self._attention_backend)
        else:
            tokens = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        tokens = attn.to_out[1](attn.to_out[0](tokens.flatten(2)))  # projection, dropout: [B,L+F·S,D]
        return tokens[:, num_text_tokens:], tokens[:, :num_text_tokens]


def _rotate_video_tokens(
    tokens: torch.Tensor, num_text_tokens: int, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Rotary positions for [B,h,L+F·S,d]: text tokens have none."""
    text, video = tokens[:, :, :num_text_tokens], tokens[:, :, num_text_tokens:]
    return torch.cat([text, apply_rotary_emb(video, image_rotary_emb)], dim=2)


def control_attention_bias(
    num_frames: int,
    tokens_per_frame: int,
    control_attention: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Additive bias [F·S,F] of attention from video tokens to the F control keys, one a latent frame.

    `token_causal` is the published form. There each control key stands S times in a row and a lower-triangular
    mask over [F·S,F·S] leaves the p-th token of frame f with S copies of every earlier frame's key and p+1 of
    its own. A key that occurs n times in a softmax weighs as one key with log(n) added to its score, so F
    keys and this bias give the same result. Rows are shifted by −log(S), which a softmax does not see, to stay
    exact in bf16: earlier frames 0, the own frame log((p+1)/S), later ones −inf.

    `frame_causal`: every token of frame f sees the keys of frames ≤ f alike.
    """
    frames = torch.arange(num_frames, device=device)
    query_frame = frames.repeat_interleave(tokens_per_frame)[:, None]  # [F·S,1]
    bias = torch.zeros(num_frames * tokens_per_frame, num_frames, device=device, dtype=torch.float64)
    if control_attention == "token_causal":
        position = torch.arange(tokens_per_frame, device=device, dtype=torch.float64)
        own = torch.log((position + 1) / tokens_per_frame).repeat(num_frames)[:, None]  # [F·S,1]
        bias = torch.where(frames == query_frame, own, bias)
    elif control_attention != "frame_causal":
        raise ValueError(f"control_attention is {control_attention!r}; it must be 'token_causal' or 'frame_causal'")
    return bias.masked_fill(frames > query_frame, float("-inf")).to(dtype)


class ControlAttnProcessor:
    """Video tokens [B,F·S,D] attend to control tokens [B,F·K,D] under a bias [F·S,F·K]; no rotary embedding.

    Always SDPA: with so few keys the product is a few hundred times smaller than self-attention, and few other
    kernels take a bias. Not cuDNN's, PyTorch's first choice on the newest GPUs: with so few keys it takes three times
    as long.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        temporal_position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`temporal_position` [F,D], when given, tells queries and keys (not values) which frame they belong to."""
        query_input, key_input = hidden_states, encoder_hidden_states
        if temporal_position is not None:
            num_frames = len(temporal_position)
            query_input, key_input = (  # [B,F,S or K,D] and back
                (tokens.unflatten(1, (num_frames, -1)) + temporal_position[:, None]).flatten(1, 2)
                for tokens in (query_input, key_input)
            )

        query, key, value = (
            projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B,h,·,d]
            for projection, tokens in (
                (attn.to_q, query_input),
                (attn.to_k, key_input),
                (attn.to_v, encoder_hidden_states),
            )
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        # The fused kernels' backward is slow with so few keys: 1.4 ms a layer, measured with one a frame.
        kernels = SDPBackend.MATH if torch.is_grad_enabled() and query.requires_grad else NOT_CUDNN
        with sdpa_kernel(kernels) if query.is_cuda else nullcontext():
            tokens = nnf.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)  # [B,h,F·S,d]
        tokens = tokens.transpose(1, 2).flatten(2)  # [B,F·S,D]
        return attn.to_out[1](attn.to_out[0](tokens))
