"""The played model: what compiling it changes, and what has to be the same for a control log to be replayed."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cogvideox.light_decoder import LightVideoDecoder
from common.cogvideox.pipeline_io import load_component
from common.cogvideox.speed import SpeedOptions
from common.config.errors import UserError
from common.serving.commands import differences
from common.serving.model import ModelOptions, Start, WorldModel, inspect_model


def test_a_compiled_model_is_ready_when_loaded_and_makes_the_same_world(tiny_world_model):
    plain = tiny_world_model
    told = []
    options = replace(plain.options, speed=SpeedOptions(compile=True))
    try:
        compiled = WorldModel.load(options, plain.info, lambda share, message: told.append((share, message)))
        shares = [share for share, _ in told]
        assert shares == sorted(shares) and shares[-1] < 1 and any("compiling" in message for _, message in told)

        def first_chunks(model):
            stream = model.open(Start("a red car", seed=3), model.encode("a red car"), lambda: "D")
            return np.stack([next(stream)[-4:] for _ in range(3)]).astype(int)

        # A further stream compiles nothing: loading has met all kinds of calls.
        with torch.compiler.set_stance("fail_on_recompile"):
            found = first_chunks(compiled)
        assert np.abs(found - first_chunks(plain)).max() <= 1  # of 255
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize(
    "logged, told",
    [
        ({"fps": 8.0, "clips": None}, ""),
        ({"speed": SpeedOptions(decode_device="cpu")}, ""),
        ({"dtype": "bfloat16"}, "dtype is float32 (in the log: bfloat16)"),
        ({"device": "meta", "dtype": "float32"}, "device is cpu (in the log: meta)"),
        ({"speed": SpeedOptions(decode_device="meta")}, "decode_device is not given (in the log: meta)"),
        ({"speed": SpeedOptions(compile=True)}, "compile is not given (in the log: on)"),
        ({"speed": SpeedOptions(float8=True)}, "float8 is not given (in the log: on)"),
        (
            {"speed": SpeedOptions(attention_backend="_native_math"), "guidance_scale": 0.0},
            "guidance_scale is not given (in the log: 0.0), attention_backend is not given (in the log: _native_math)",
        ),
    ],
)
def test_what_changes_a_streams_frames_is_told_apart(tiny_models, logged, told):
    options = ModelOptions(str(tiny_models / "stage3"), device="cpu")
    assert differences(inspect_model(options).settings, inspect_model(replace(options, **logged)).settings) == told


@pytest.mark.parametrize("name", ["guidance_scale", "control_guidance_scale"])
def test_a_distilled_model_is_not_guided_again(tiny_world_model, name):
    with pytest.raises(UserError, match=f"^{name} 2: "):
        inspect_model(replace(tiny_world_model.options, **{name: 2.0}))


def test_a_model_trained_anew_in_its_place_is_another(tiny_models, tmp_path):
    """And so is a light decoder."""
    model, light = tmp_path / "stage4", tmp_path / "light"
    shutil.copytree(tiny_models / "stage4", model)
    decoder = LightVideoDecoder.for_vae(
        load_component(model, "vae"), widths=(16, 8, 8), layers=(1, 1, 1), memory_layers=(1, 1, 0)
    )
    decoder.save_pretrained(light)
    options = ModelOptions(str(model), device="cpu", speed=SpeedOptions(light_decoder=light))
    before = inspect_model(options).settings
    shutil.copytree(model, tmp_path / "elsewhere" / "stage4")  # with other times
    assert inspect_model(replace(options, model_path=str(tmp_path / "elsewhere" / "stage4"))).settings == before
    for directory, told in ((model / "transformer", "the model's weights are others"), (light, "light_decoder is ")):
        file = directory / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        after = inspect_model(options).settings
        assert told in differences(after, before)
    assert differences(after, before).count(",") == 1
