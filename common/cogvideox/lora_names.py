"""What a LoRA's factors are called by different programs: diffusers' module names ↔ those of ComfyUI.

| form | one factor of block 0's query projection |
|---|---|
| diffusers | `transformer.transformer_blocks.0.attn1.to_q.lora_A.weight` |
| comfyui | `diffusion_model.blocks.0.q.lora_down.weight` |
| comfyui-wrapper | `lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight` |

diffusers keeps alpha in the file's metadata, the other two in a scalar beside the factors (`….alpha`).
Sources: ComfyUI (comfy/lora.py: any `diffusion_model.` module; comfy/ldm/cogvideo/model.py: the modules' names) and
kijai's ComfyUI-CogVideoXWrapper, which takes diffusers' files too (model_loading.py, lora_utils.py).
"""

import re

from common.config.errors import UserError

FORMS = ("diffusers", "comfyui", "comfyui-wrapper")

# Every layer of CogVideoX that a LoRA can sit on: in a block, and outside of the blocks.
_IN_BLOCK = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
    "norm2.linear": "norm2.linear",
}
_OUTSIDE = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}
_DIFFUSERS_PREFIXES = ("transformer.", "base_model.model.", "")  # diffusers', PEFT's own, none
_PREFIXES = {"comfyui": "diffusion_model.", "comfyui-wrapper": "lora_unet_"}
_FACTOR = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)\.weight$|\.alpha$")
_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", None: "alpha"}


def write_key(module: str, part: str, form: str) -> str:
    """A factor's name in a file.

    Args:
        module: diffusers' name of the layer, such as "transformer_blocks.0.attn1.to_q".
        part: "A", "B" or "alpha".
        form: one of `FORMS`; diffusers' has no alpha.

    Raises:
        UserError: ComfyUI has no such layer (the control adapter's, say).
    """
    if form == "diffusers":
        assert part != "alpha"
        return f"transformer.{module}.lora_{part}.weight"
    ending = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}[part]
    return f"{_PREFIXES[form]}{_to_comfyui(module, form)}.{ending}"


def read_key(key: str) -> tuple[str, str]:
    """(layer's diffusers name, "A" or "B" or "alpha") of a name in a file of any form; UserError for what is none."""
    found = _FACTOR.search(key)
    if found is None:
        raise UserError(f"{key!r} is no factor of a LoRA; known are lora_A, lora_B, lora_down, lora_up and alpha")
    name, part = key[: found.start()], _PARTS[found[1]]
    for form, prefix in _PREFIXES.items():
        if name.startswith(prefix):
            return _from_comfyui(name.removeprefix(prefix), form), part
    prefix = next(p for p in _DIFFUSERS_PREFIXES if name.startswith(p))
    return name.removeprefix(prefix), part


def _table(form: str, block: str) -> dict[str, str]:
    """diffusers' name → ComfyUI's, of the layers in one block and outside."""
    if form == "comfyui":
        inside = {
            f"transformer_blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for ours, theirs in _IN_BLOCK.items()
        }
        return inside | _OUTSIDE
    names = [*(f"transformer_blocks.{block}.{name}" for name in _IN_BLOCK), *_OUTSIDE]
    return {name: name.replace(".", "_") for name in names}


def _to_comfyui(module: str, form: str) -> str:
    block = re.match(r"transformer_blocks\.(\d+)\.", module)
    names = _table(form, block[1] if block else "")
    if module not in names:
        raise UserError(
            f"ComfyUI's CogVideoX has no layer {module}; a LoRA for it cannot be written in the form {form}"
        )
    return names[module]


def _from_comfyui(name: str, form: str) -> str:
    block = re.match(r"(?:blocks\.|transformer_blocks_)(\d+)[._]", name)
    names = {theirs: ours for ours, theirs in _table(form, block[1] if block else "").items()}
    if name not in names:
        raise UserError(f"{_PREFIXES[form]}{name} is no layer of CogVideoX by ComfyUI's names")
    return names[name]
