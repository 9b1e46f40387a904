"""The played model: what compiling it changes, and what has to be the same for a control log to be replayed."""

import json
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
from common.serving.history import History
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
            {"speed": SpeedOptions(attention_backend="_native_math"), "guidance_scale": 2.0},
            "guidance_scale is not given (in the log: 2.0), attention_backend is not given (in the log: _native_math)",
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
    others = {model / "transformer": "the model's weights are others", light: "the light_decoder is another"}
    for directory, told in others.items():
        file = directory / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        after = inspect_model(options).settings
        assert told in differences(after, before)
    assert differences(after, before).count(",") == 1


def test_a_model_with_another_component_is_another(tiny_models, tmp_path):
    model = tmp_path / "stage4"
    shutil.copytree(tiny_models / "stage4", model)
    options = ModelOptions(str(model), device="cpu")
    before = inspect_model(options).settings

    def told_of(name, file, **values):
        """What a log of before is told once a JSON file of a component says something else."""
        path = model / name / file
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | values))
        told = differences(inspect_model(options).settings, before)
        path.write_text(text)
        return told

    assert told_of("scheduler", "scheduler_config.json", condition_timestep=20) == "the scheduler is another"
    assert told_of("control_vocabulary", "vocabulary.json", label="last") == "the control_vocabulary is another"
    assert told_of("text_encoder", "config.json", dense_act_fn="gelu") == "the text_encoder is another"
    assert told_of("tokenizer", "tokenizer_config.json", model_max_length=8) == "the tokenizer is another"
    assert told_of("scheduler", "scheduler_config.json", _diffusers_version="9") == ""  # the same, written anew
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(vae).items()}, vae, {"format": "pt"})
    assert differences(inspect_model(options).settings, before) == "the vae is another"
    # A log that was written when the weights alone were known.
    old = before[: before.index(" vae=")]
    told = differences(before, old)
    assert told.startswith("vae is ") and told.count("(in the log: not given)") == 5


def test_a_log_holds_all_settings_that_a_model_can_have(tiny_models):
    """Even of those that no one machine can do together."""
    info = inspect_model(ModelOptions(str(tiny_models / "stage4"), device="cpu"))
    rest = "guidance_scale=6.0 num_inference_steps=1000 compile=on float8=on attention_backend=_sage_qk_int8_pv_fp8 "
    rest += f"light_decoder={'f' * 16} decode_device=cuda fps=23.976023976023978 clip={'f' * 32}"
    history = History(info, Start("p", 3))
    history.settings = f"{info.settings} {rest}"
    assert history.log(1, 0, 1).settings == history.settings
