"""The Interactive Module: what a control signal is, and how video tokens attend to it.

Shapes: B batch, F latent frames, S tokens per latent frame, K control tokens per latent frame (published: 1),
D model width, E time embedding width.
Source: The Matrix, arXiv 2412.03568, section 3.2 (Interactive Module).
"""

import json
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import nn

from common.cogvideox.attention import ControlAttnProcessor
from common.cogvideox.normalization import FrameLayerNormZero
from common.config.errors import UserError

NULL_INDEX = -1  # index of the null row: "no command is given", the condition that control dropout trains
LABELS = ("mean", "last")  # ways to make one row of the signals of a latent frame's raw frames


class ControlBlock(nn.Module):
    """Adds gate · attention(video tokens → control tokens) to the video tokens; no feed-forward.

    Args:
        zero_init: start with the gate at zero, so that a new adapter leaves the model as it was.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, time_embed_dim: int, norm_eps: float, zero_init: bool):
        super().__init__()
        self.norm1 = FrameLayerNormZero(time_embed_dim, dim, eps=norm_eps)
        self.attn1 = Attention(
            query_dim=dim, heads=num_heads, dim_head=head_dim, qk_norm="layer_norm", eps=1e-6, bias=True,
            processor=ControlAttnProcessor(),
        )  # fmt: skip
        if zero_init:
            # Of the six modulations only the video tokens' gate is zero: the others get no gradient through it,
            # but need none to be useful once it opens.
            nn.init.zeros_(self.norm1.linear.weight[2 * dim : 3 * dim])
            nn.init.zeros_(self.norm1.linear.bias[2 * dim : 3 * dim])

    def forward(
        self,
        hidden_states: torch.Tensor,
        control_states: torch.Tensor,
        temb: torch.Tensor,
        attention_bias: torch.Tensor,
        temporal_position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B,F·S,D], [B,F·K,D], [B,E] or [B,F,E], [F·S,F·K], [F,D] or None → [B,F·S,D]."""
        video, control, gate, _ = self.norm1(hidden_states, control_states, temb)
        attended = self.attn1(
            video,
            encoder_hidden_states=control,
            attention_mask=attention_bias,
            temporal_position=temporal_position,
        )
        return hidden_states + gate * attended


def make_control_embedding(control_dim: int, dim: int, tokens_per_frame: int = 1) -> nn.Sequential:
    """Control rows [B,F,control_dim] → K control tokens a frame, [B,F,K·D]; keys `control_embedding.{0,2,4}`."""
    return nn.Sequential(
        nn.Linear(control_dim, control_dim),
        nn.SiLU(),
        nn.Linear(control_dim, dim),
        nn.SiLU(),
        nn.Linear(dim, tokens_per_frame * dim),
    )


class ControlVocabulary:
    """The signals a model obeys: names ↔ indices, one row of `control_dim` numbers a signal, and a null row.

    It is stored with the model (`control_vocabulary/` in a pipeline directory), so inference needs no CLIP.

    Args:
        names: the signals, in index order.
        table: [num_signals, control_dim] float.
        null: [control_dim], the row of "no command".
        label: what a model with this table is told of a latent frame, see `frame_rows`. Published models, whose
            directories do not say, were told the "last".
    """

    config_name = "vocabulary.json"
    weights_name = "table.safetensors"

    def __init__(self, names: list[str], table: torch.Tensor, null: torch.Tensor, label: str = "last"):
        if len(set(names)) != len(names) or table.shape != (len(names), null.numel()):
            raise ValueError(
                f"{len(names)} names (unique?) with a table {tuple(table.shape)}, null {tuple(null.shape)}"
            )
        if label not in LABELS:
            raise ValueError(f"label {label!r} is not one of {', '.join(LABELS)}")
        self.names, self.label = list(names), label
        self._rows = torch.cat([table, null.reshape(1, -1)]).float().cpu()  # the null row last: index −1 finds it

    @property
    def control_dim(self) -> int:
        return self._rows.shape[1]

    @property
    def table(self) -> torch.Tensor:
        """[num_signals, control_dim]"""
        return self._rows[:-1]

    @property
    def null(self) -> torch.Tensor:
        """[control_dim]"""
        return self._rows[-1]

    def indices(self, names: list[str]) -> torch.Tensor:
        """Names → int64 [len(names)]. A name outside the vocabulary is a `UserError`."""
        known = {name: index for index, name in enumerate(self.names)}
        for position, name in enumerate(names):
            if name not in known:
                names = ", ".join(self.names)
                raise UserError(f"control signal {name!r} (number {position + 1}) is unknown; the model knows {names}")
        return torch.tensor([known[name] for name in names], dtype=torch.long)

    def embed(self, indices: torch.Tensor) -> torch.Tensor:
        """int64 […], −1 for null → float32 […, control_dim], on the indices' device."""
        if self._rows.device != indices.device:
            self._rows = self._rows.to(indices.device)  # once per device: nine rows
        return self._rows[indices]

    def frame_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Signals of the raw frames of each latent frame, int64 […,R] → a row for each latent frame […,control_dim].

        Footage changes its signal under any of a latent frame's four raw frames. Told the last one's alone, as
        published, a model learns that the answer comes zero to three frames late, by chance. The mean says how much of
        the latent frame is under each; a signal that holds for whole latent frames is then answered at once.
        """
        return self.embed(indices[..., -1]) if self.label == "last" else self.embed(indices).mean(dim=-2)

    @classmethod
    def orthogonal(cls, names: list[str], control_dim: int, seed: int = 0) -> "ControlVocabulary":
        """Fixed orthogonal rows of unit mean square, null row zero: needs no text encoder (the mini world's table)."""
        if control_dim < len(names):
            raise UserError(f"control_dim is {control_dim}; {len(names)} orthogonal signals need at least as many")
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(control_dim, control_dim, generator=generator, dtype=torch.float64)
        rows = torch.linalg.qr(square).Q[: len(names)] * control_dim**0.5
        return cls(names, rows.float(), torch.zeros(control_dim))

    @classmethod
    @torch.no_grad()
    def from_clip(cls, sentences: dict[str, str], text_encoder: str) -> "ControlVocabulary":
        """CLIP text features of one sentence a signal; the null row is CLIP of "".

        Args:
            sentences: signal → sentence, in index order.
            text_encoder: directory or hub id of a CLIP model (published models: openai/clip-vit-large-patch14).
        """
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        try:
            tokenizer = AutoTokenizer.from_pretrained(text_encoder)
            model = CLIPTextModelWithProjection.from_pretrained(text_encoder)
        except (OSError, ValueError) as error:
            raise UserError(f"no CLIP text encoder could be loaded from {text_encoder!r}: {error}") from error
        rows = []
        for sentence in [*sentences.values(), ""]:  # one at a time: nothing is padded
            tokens = tokenizer(sentence, truncation=True, return_tensors="pt")
            rows.append(model(**tokens).text_embeds[0])  # [control_dim]
        return cls(list(sentences), torch.stack(rows[:-1]), rows[-1])

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"names": self.names, "label": self.label}
        (directory / self.config_name).write_text(json.dumps(config, indent=2) + "\n")
        save_file({"table": self.table.contiguous(), "null": self.null.contiguous()}, directory / self.weights_name)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ControlVocabulary":
        directory = Path(directory)
        for name in (cls.config_name, cls.weights_name):
            if not (directory / name).is_file():
                raise UserError(f"{directory} holds no control vocabulary: {name} is missing; stage 2 writes it")
        rows = load_file(directory / cls.weights_name)
        config = json.loads((directory / cls.config_name).read_text())
        try:
            return cls(config["names"], rows["table"], rows["null"], config.get("label", "last"))
        except ValueError as error:
            raise UserError(f"{directory}: {error}") from error
