"""Checkpoints of a controlled transformer from elsewhere: any that have the published layout's keys.

The layout is diffusers' CogVideoX with `control_embedding.{0,2,4}.*` and `control_blocks.{i}.*` (control_adapter.py),
in one safetensors file or in several with an index; a config.json beside them, or none.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from common.cogvideox.pipeline_io import refuse_other_keys
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.config.errors import UserError, one_line

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def load_published_transformer(
    checkpoint: str | Path,
    base_config: dict[str, Any],
    control_layers: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> CogVideoXControlTransformer3DModel:
    """A controlled transformer from a checkpoint in the published layout, in the published form of attention.

    Args:
        checkpoint: a safetensors file, a folder of them, or a pipeline directory with such a `transformer` folder.
        base_config: config of the base's transformer, for a checkpoint without a config.json.
        control_layers: [start, end) of the base blocks that control blocks follow; None takes the config's, or without
            one the last as many as there are control blocks.
        dtype: None keeps the stored type.

    Raises:
        UserError: no such weights, or not exactly the keys and shapes of the model; it names the first that differ.
    """
    path = Path(checkpoint)
    files = find_weights(path)
    shapes = stored_shapes(files)
    if "control_embedding.0.weight" not in shapes:
        raise UserError(
            f"{path} is no controlled transformer: control_embedding.0.weight is missing; its first keys are "
            f"{', '.join(sorted(shapes)[:3])}"
        )
    config = _read_config(files[0].parent / "config.json") or base_config
    if config.get("control_dim") is None:
        config = _config_from_shapes(config, shapes)
    if control_layers is not None:
        config = {**config, "control_start_layer": control_layers[0], "control_end_layer": control_layers[1]}
    try:
        with init_empty_weights():  # buffers are real: positions are in no checkpoint
            fields = {key: value for key, value in config.items() if not key.startswith("_")}
            model = CogVideoXControlTransformer3DModel.from_config(fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    differing = [(k, shapes[k], wanted[k]) for k in shapes.keys() & wanted.keys() if shapes[k] != wanted[k]]
    refuse_other_keys(path, wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys(), differing)
    for file in files:
        model.load_state_dict(load_file(file), strict=False, assign=True)
    if dtype is not None:
        nn.Module.to(model, dtype)  # diffusers' own `to` warns of an empty list of float32 modules
    return model.eval()


def find_weights(path: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint. UserError if there are none, or not all of them."""
    if path.is_file():
        return [path]
    if (path / "transformer").is_dir():
        path = path / "transformer"
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a safetensors file, or a folder of them")
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{indices[0]} is no index of safetensors shards: {one_line(error)}") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f"{indices[0]} names {len(missing)} files that are missing ({', '.join(missing[:3])})")
        return [path / name for name in names]
    if path / WEIGHTS_NAME in files:
        return [path / WEIGHTS_NAME]
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:3]) or "none"
        raise UserError(f"{path} should hold {WEIGHTS_NAME} or shards with an index; its safetensors files: {names}")
    return files


def stored_shapes(files: list[Path]) -> dict[str, list[int]]:
    """Key → shape, from the files' headers alone."""
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as content:
                shapes |= {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no whole safetensors file: {one_line(error)}") from error
    return shapes


def _read_config(file: Path) -> dict[str, Any]:
    """A config.json; {} without the file."""
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(stored, dict) or "num_layers" not in stored:
        raise UserError(f"{file} is not the config of a CogVideoX transformer: it has no num_layers")
    return stored


def _config_from_shapes(config: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """A plain model's config, and what the adapter's own keys say."""
    blocks = {key.split(".")[1] for key in shapes if key.startswith("control_blocks.")}
    guidance = shapes.get("time_embedding.cond_proj.weight")
    layers = config["num_layers"]
    return {
        **config,
        "control_dim": shapes["control_embedding.0.weight"][1],
        "control_start_layer": layers - len(blocks),
        "control_end_layer": layers,
        "cond_proj_dim": guidance and guidance[1],
    }
