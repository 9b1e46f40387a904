"""What a user sees of bad input to the programs around training: fusing, inference, the mini world, contact sheets. One
line, an exit code other than 0, and nothing written."""

import shutil
from pathlib import Path

import pytest
import torch

from common.cogvideox.pipeline_io import load_component
from common.cogvideox.transformer import CogVideoXControlTransformer3DModel
from common.tools import contact_sheet
from data.miniworld import make_base, make_videos


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


FUSE = "stage1/fuse_lora_weights.py"


def test_fusing(refused, tiny_lora, tiny_models, tiny_base, tmp_path):
    def fuse(base, path, output=tmp_path / "fused", *more):
        line = refused(FUSE, "--pretrained_model_path", base, "--lora_path", path, "--output_dir", output, *more)
        assert not (tmp_path / "fused").exists()
        return line

    small = tmp_path / "small"
    shutil.copytree(tiny_base, small)
    transformer = load_component(tiny_base, "transformer")
    smaller = type(transformer).from_config({**transformer.config, "num_layers": 1})
    shutil.rmtree(small / "transformer")
    smaller.save_pretrained(small / "transformer")
    assert "belongs to another model: the base has no layer transformer_blocks." in fuse(small, tiny_lora)
    assert "no LoRA at" in fuse(tiny_base, tiny_base)
    assert "here belongs a text-to-video pipeline" in fuse(tiny_models / "stage2", tiny_lora)
    assert "holds a LoRA, not a pipeline" in fuse(tiny_lora, tiny_lora)
    damaged = tmp_path / "pytorch_lora_weights.safetensors"
    damaged.write_bytes((tiny_lora / damaged.name).read_bytes()[:3000])
    assert "is not a LoRA file" in fuse(tiny_base, damaged)
    assert "is no directory; choose another" in fuse(tiny_base, tiny_lora, damaged / "out")


INFERENCE_MISTAKES = [
    (2, "--control D*16,LEFT*17", "--control: unknown control token 'LEFT' (item 2); known are D, DL"),
    (2, "--control D*16 --num_frames 33", "covers 16 raw frames, the clip has 33; hold a signal longer, as in D*33"),
    (2, "--control D", "covers 1 raw frames, the clip has 5"),
    (2, "--control_file /nowhere.txt", "cannot read the control file /nowhere.txt"),
    (2, "--num_frames 32", "argument --num_frames: 32 does not fit; use 29 or 33"),
    (2, "--height 40", "argument --height: 40 does not fit; use 32 or 48"),
    (4, "--width 0", "argument --width: 0 is too small; use 16 or more"),
    (4, "--seconds 0", "argument --seconds: '0' is not a number of more than 0"),
    (4, "", "how long? give --seconds or --groups, or a control string that says it"),
    (4, "--widht 32 --groups 1", "unrecognized arguments: --widht 32"),
    (3, "--num_inference_steps 6 --groups 1", "6 inference steps do not divide among 4 noise groups; 4 or 8 would"),
    (4, "--num_inference_steps 8 --groups 1", "num_inference_steps=8: the model was distilled for 4"),
    (4, "--guidance_scale 3 --groups 1", "guidance_scale 3: the model learnt its guidance when it was distilled"),
    (4, "--control_guidance_scale 2 --groups 1", "control_guidance_scale 2: the model learnt its guidance"),
    (4, "--groups 1 --device cuda:77", "--device cuda:77: "),
    (4, "--groups 1 --device gpu", "--device gpu: "),
    (4, "--groups 1 --init_video /nowhere.mp4", "/nowhere.mp4: there is no such video file"),
    (4, "--groups 1 --model_path /nowhere", "no model directory at /nowhere"),
    (3, "--groups 1 --model_path {models}/stage2", "is a controlled pipeline (stage 2); here belongs a streaming"),
    (2, "--model_path {models}/stage3", "is a streaming pipeline (stage 3 or 4); here belongs a controlled"),
    (1, "--model_path {models}/stage2", "here belongs a text-to-video pipeline"),
    (1, "--model_path {base} --lora_path {base}", "no LoRA at"),
    (4, "--groups 1 --output video.avi", "--output video.avi: give a file whose name ends in .mp4"),
    (4, "--groups 1 --output {file}/out/video.mp4", "is no directory; choose another"),
]


@pytest.mark.parametrize(("stage", "words", "message"), INFERENCE_MISTAKES, ids=lambda v: str(v)[:40])
def test_inference(refused, tiny_models, tiny_base, tmp_path, monkeypatch, stage, words, message):
    """Everything is refused before weights are read, and a video made earlier under the same name stays."""
    monkeypatch.setattr(CogVideoXControlTransformer3DModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video.mp4").write_bytes(b"of yesterday")
    words = words.format(models=tiny_models, base=tiny_base, file=tmp_path / "video.mp4").split()
    line = refused(f"stage{stage}/inference.py", "--model_path", tiny_models / f"stage{stage}", "--prompt", "x", *words)
    assert message in line
    assert contents(tmp_path) == {"video.mp4": b"of yesterday"}


def test_out_of_memory(refused, tiny_models, tmp_path, monkeypatch):
    """The line names this program's options, and the video that has no frame yet is gone."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(CogVideoXControlTransformer3DModel, "forward", fail)
    words = [
        "--model_path",
        tiny_models / "stage4",
        "--prompt",
        "x",
        "--control",
        "D*9",
        "--output",
        tmp_path / "v.mp4",
    ]
    line = refused("stage4/inference.py", *words)
    assert "--height and --width" in line and not (tmp_path / "v.mp4").exists()


def test_init_video_that_is_too_short(refused, tiny_models, tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(CogVideoXControlTransformer3DModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    video = tiny_world / "videos" / "00000.mp4"
    words = [
        "--model_path",
        tiny_models / "stage4",
        "--prompt",
        "x",
        "--seconds",
        1,
        "--output",
        tmp_path / "video.mp4",
    ]
    line = refused("stage4/inference.py", *words, "--init_video", video, "--frames_per_group", 4)
    assert f"{video}: 2.00 s" in line and "4.00 s are needed for 65 frames at 16 fps" in line
    assert not contents(tmp_path)


def test_outputs_below_a_file(refused, tiny_world, tmp_path):
    """Not even root can write there."""
    file = tmp_path / "file"
    file.touch()
    where = f"{file} is no directory; choose another"
    assert where in refused(make_videos.main, "--output_dir", file / "out")
    assert where in refused(make_base.main, "--data_root", tiny_world, "--output_dir", file / "out")
    video = tiny_world / "videos" / "00000.mp4"
    assert where in refused(contact_sheet.main, f"a={video}", "--output", file / "sheet.png")


def test_mini_world_tools(refused, tiny_world, tmp_path):
    out = ["--output_dir", tmp_path / "out"]
    assert "'many' is not a whole number" in refused(make_videos.main, *out, "--num_workers", "many")
    assert "--height 40 --width 96: use multiples of 16" in refused(make_videos.main, *out, "--height", 40)
    base = [*out, "--data_root", tiny_world, "--num_heldout", 1]
    assert "--num_frames 32: use 4n+1 frames" in refused(make_base.main, *base, "--num_frames", 32)
    assert "--device gpu: " in refused(make_base.main, *base, "--device", "gpu")
    assert "--num_heldout 9 leaves none to train on" in refused(make_base.main, *base, "--num_heldout", 9)
    assert "index_file: cannot read" in refused(make_base.main, *base, "--index_file", tmp_path / "none.json")
    assert "give a file whose name ends in .png" in refused(contact_sheet.main, "a=b", "--output", tmp_path / "a.jpg")
    assert "there is no such video file" in refused(contact_sheet.main, "a=b", "--output", tmp_path / "a.png")
    assert not contents(tmp_path)
