"""LoRA files of a CogVideoX transformer: stage 1's own, those of diffusers' trainers, and ComfyUI's.

A LoRA adds alpha/r · B·A to the weights of a linear layer (arXiv 2106.09685). The factors alone do not say alpha: it
stands in the file's metadata (diffusers since 0.34, and stage 1) or beside the factors (ComfyUI). Where it stands
nowhere alpha = r is assumed, which is what diffusers does, and said; `lora_alpha` states another.

Shapes: A [r, in], B [out, r], r the rank.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.cogvideox.lora_names import read_key, write_key
from common.cogvideox.pipeline_io import LORA_NAME
from common.config.errors import UserError, one_line
from common.config.files import replacing

logger = logging.getLogger(__name__)

PREFIX = "transformer."


@dataclass(frozen=True)
class Lora:
    """A LoRA in memory.

    `factors`: layer's diffusers name → (A, B). `config`: PEFT's `LoraConfig` as a dict, as diffusers stores it.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]

    def scaling(self, layer: str) -> float:
        """What B·A is multiplied with: alpha/r as PEFT forms it (alpha/√r for rank-stabilised ones)."""
        config, rank = LoraConfig(**self.config), len(self.factors[layer][0])
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
        return alpha / (rank**0.5 if config.use_rslora else rank)


def find_lora_file(lora_path: str | Path) -> Path:
    """The file itself, or the one that stage 1 and diffusers write into a directory."""
    path = Path(lora_path)
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no LoRA at {lora_path}: give a {LORA_NAME}, or stage 1's output_dir once it has finished")
    return file


def read_lora(file: Path, lora_alpha: float | None = None) -> Lora:
    """A LoRA file in any of the forms of `lora_names`.

    Args:
        lora_alpha: for files that do not state alpha; None assumes alpha = r, and says so.

    Raises:
        UserError: not a safetensors file, a key that is no LoRA's, a factor without its other half, or `lora_alpha`
            where the file states alpha itself.
    """
    try:
        with safe_open(file, "pt") as content:
            header = content.metadata() or {}
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (safe_open is no dict)
        config = _stored_config(header)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a LoRA file (safetensors): {one_line(error).split('. ')[0]}") from error
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        for key, tensor in tensors.items():
            layer, part = read_key(key)
            parts.setdefault(layer, {})[part] = tensor
    except UserError as error:
        raise UserError(f"{file} holds no LoRA weights, or more than those: {error}") from error
    if not parts:
        raise UserError(f"{file} holds no LoRA weights")
    factors = {layer: _pair(layer, part, file) for layer, part in parts.items()}
    alphas = {layer: part["alpha"].item() for layer, part in parts.items() if "alpha" in part}
    if (config or alphas) and lora_alpha is not None:
        said = config["lora_alpha"] if config else Counter(alphas.values()).most_common()[0][0]
        raise UserError(f"lora_alpha {lora_alpha:g} was given, but {file} itself says {said:g}; leave it out")
    lora = Lora(factors, config or _make_config(factors, alphas, lora_alpha))
    if not config and not alphas and lora_alpha is None:
        logger.warning(
            "%s does not say its alpha: alpha = rank = %d is assumed, as diffusers does; --lora_alpha states another",
            file, lora.config["r"],
        )  # fmt: skip
    _check_ranks(lora, file)
    return lora


def write_lora(file: Path, lora: Lora, form: str = "diffusers") -> None:
    """Writes a LoRA in one of the forms of `lora_names`; reading it gives the same LoRA, bit for bit.

    Raises UserError when ComfyUI has no such layer.
    """
    tensors = {}
    for layer, (a, b) in lora.factors.items():
        tensors |= {write_key(layer, "A", form): a.contiguous(), write_key(layer, "B", form): b.contiguous()}
        if form != "diffusers":  # ComfyUI's programs read alpha as a tensor and divide it by the rank themselves
            tensors[write_key(layer, "alpha", form)] = torch.tensor(lora.scaling(layer) * len(a))
    # ComfyUI does not look at the metadata; with it the way back loses nothing.
    config = {PREFIX + key: sorted(v) if isinstance(v, set) else v for key, v in lora.config.items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    with replacing(file) as beside:
        save_file(tensors, beside, metadata)


def add_lora(transformer: nn.Module, lora_file: Path, lora_alpha: float | None = None) -> None:
    """Loads a LoRA file into a CogVideoX transformer as its adapter, at the strength it was trained at.

    A LoRA of another model is a `UserError`: diffusers only warns about layers that it does not find.
    """
    lora = read_lora(lora_file, lora_alpha)
    check_lora_fits(lora, transformer, lora_file)
    state = {}
    for layer, (a, b) in lora.factors.items():
        state |= {write_key(layer, "A", "diffusers"): a, write_key(layer, "B", "diffusers"): b}
    config = {PREFIX + key: value for key, value in lora.config.items()}
    CogVideoXPipeline.load_lora_into_transformer(state, transformer, metadata=config)


def cut_lora(lora: Lora, share: float) -> Lora:
    """The smaller LoRA that keeps, of every layer's B·A, `share` (0…1) of the sum of squared singular values.

    It is the nearest of its rank, the fewest singular values that suffice (Eckart and Young); ranks then differ from
    layer to layer. Its strength stays.
    """
    factors, alphas = {}, {}
    for layer, (a, b) in lora.factors.items():
        # The factors of B = Q R and Aᵀ = P S leave a matrix of rank × rank to decompose: B·A = Q (R Sᵀ) Pᵀ.
        (q, r), (p, s) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
        u, values, vh = torch.linalg.svd(r @ s.T)
        kept = values.square().cumsum(0) / values.square().sum()  # NaN, so of rank 1, where nothing is added
        rank = min(int((kept < share).sum()) + 1, len(values))
        root = values[:rank].sqrt()
        factors[layer] = ((root[:, None] * (vh[:rank] @ p.T)).to(a.dtype), (q @ u[:, :rank] * root).to(b.dtype))
        alphas[layer] = lora.scaling(layer) * rank
    return Lora(factors, _make_config(factors, alphas))


def check_lora_fits(lora: Lora, transformer: nn.Module, lora_file: Path) -> None:
    """Every pair has its layer, of its size."""
    modules = dict(transformer.named_modules())
    for name, (a, b) in lora.factors.items():
        if name not in modules:
            raise UserError(f"{lora_file} belongs to another model: the base has no layer {name}")
        if not isinstance(modules[name], nn.Linear):
            raise UserError(f"{lora_file} belongs to another model: in the base {name} is no linear layer")
        rows, columns = modules[name].weight.shape
        for size, wanted in ((a.shape[1], columns), (b.shape[0], rows)):
            if size != wanted:
                raise UserError(
                    f"{lora_file} belongs to another model: {name} is {wanted} wide there, {size} in the LoRA"
                )


def _stored_config(header: dict[str, str]) -> dict[str, Any] | None:
    """The `LoraConfig` in a file's metadata, None if there is none. ValueError if it is none."""
    if LORA_ADAPTER_METADATA_KEY not in header:
        return None
    stored = json.loads(header[LORA_ADAPTER_METADATA_KEY])
    if not isinstance(stored, dict):
        raise ValueError("its metadata is no LoRA configuration: it is no JSON object")
    config = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
    try:
        LoraConfig(**config)
    except TypeError as error:
        raise ValueError(f"its metadata is no LoRA configuration: {error}") from error
    return config or None


def _pair(layer: str, parts: dict[str, Tensor], file: Path) -> tuple[Tensor, Tensor]:
    for part in "AB":
        if part not in parts:
            raise UserError(f"{file} is incomplete: factor {part} of {layer} is missing")
    a, b = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(f"{file}: the factors of {layer} are {shapes}, not [rank, in] and [out, rank]")
    return a, b


def _check_ranks(lora: Lora, file: Path) -> None:
    pattern, common = lora.config.get("rank_pattern") or {}, lora.config["r"]
    for layer, (a, _) in lora.factors.items():
        said = pattern.get(get_pattern_key(pattern, layer), common)
        if len(a) != said:
            raise UserError(f"{file}: its metadata says rank {said}, but the factors of {layer} have rank {len(a)}")


def _make_config(
    factors: dict[str, tuple[Tensor, Tensor]], alphas: dict[str, float], lora_alpha: float | None = None
) -> dict[str, Any]:
    """The `LoraConfig` that factors stand for; ranks and alphas may differ from layer to layer."""
    ranks = {layer: len(a) for layer, (a, _) in factors.items()}
    rank = Counter(ranks.values()).most_common()[0][0]
    # A layer without alpha in a file that has some is added at strength 1, as ComfyUI does.
    alphas = {layer: lora_alpha or alphas.get(layer, float(ranks[layer])) for layer in factors}
    alpha = Counter(alphas.values()).most_common()[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{layer}": r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{layer}": a for layer, a in alphas.items() if a != alpha},
        "target_modules": sorted(factors),
    }
