"""What a user sees of bad input to training and to its preparation: one line that says what is wrong, where, and what
would be right; an exit code other than 0; before a model is loaded, and nothing left that looks finished."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from common.tools import precompute, train
from common.training.cogvideox_objective import CogVideoXObjective
from stage1.training.lora import LoraObjective

ROOT = Path(__file__).parents[1]
TINY = """
    --height_buckets 32 --width_buckets 64 --frame_buckets 33 --windows_per_clip 1 --latent_cache_dir=
    --max_sequence_length 16 --train_batch_size 1 --max_train_steps 1 --num_validation_clips 1 --report_to none
    --validation_prompts --rank 4
"""


@pytest.fixture
def nothing_loaded(monkeypatch):
    """From here on no stage may load a model."""
    monkeypatch.setattr(CogVideoXObjective, "load", lambda *_: pytest.fail("models were loaded"))


@pytest.fixture
def launch(refused, tiny_world, tiny_base, tmp_path):
    """Trains stage 1 on the tiny world with some settings changed; has to be refused, and to write nothing."""

    def run(*changes: object, stage: int = 1, program: Callable[[], None] = train.main) -> str:
        config = ROOT / f"stage{stage}" / "training" / "miniworld_config.py"
        words = TINY.split() if stage == 1 else TINY.split()[:-2]
        paths = {
            "pretrained_model_name_or_path": tiny_base, "output_dir": tmp_path / "out", "data_root": tiny_world,
            "index_file": tiny_world / "index.json", "validation_index_file": "",
        }  # fmt: skip
        words += [f"--{name}={value}" for name, value in paths.items()]
        line = refused(program, "--config", config, *words, *changes)
        assert not (tmp_path / "out").exists()
        return line

    return run


def entries(tiny_world: Path) -> list[dict]:
    return json.loads((tiny_world / "index.json").read_text())["list"]


def write_index(folder: Path, listed: list) -> Path:
    path = folder / "some.json"
    path.write_text(json.dumps({"list": listed}))
    return path


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        (1, "--learning_rat 1", "--learning_rat: no such setting (did you mean learning_rate?)"),
        (1, "--rank many", "--rank: 'many' is not a whole number"),
        (1, "--frame_buckets 32", "frame_buckets: 32 frames is not 4n+1; use 29 or 33"),
        (1, "--width_buckets 72", "width_buckets: 72 is not a multiple of 16; use 64 or 80"),
        (1, "--max_sequence_length 32", "max_sequence_length: is 32; the transformer of"),
        (1, "--train_batch_size 4", "train_batch_size: 4 on 1 processes needs 4 clips at a time"),
        (1, "--data_root /nowhere", "data_root: /nowhere is no directory"),
        (1, "--index_file /nowhere.json", "index_file: /nowhere.json does not exist"),
        (1, "--pretrained_model_name_or_path /nowhere", "/nowhere is no directory; give a pipeline directory or a hub"),
        (1, "--latent_cache_dir /nowhere", "latent_cache_dir: /nowhere holds no cache; make it with"),
        (1, "--resume_from_checkpoint /nowhere", "resume_from_checkpoint: /nowhere is not a checkpoint directory"),
        (2, "--control_dim 4", "control_dim: is 4; 9 orthogonal signals need as many or more"),
        (2, "--control_start_layer 3 --control_end_layer 9", "do not lie within the model's 4 layers"),
        (2, "--validation_control D*16,LEFT*17", "unknown control token 'LEFT' (item 2); known are D, DL"),
        (2, "--validation_control D*16 --validation_prompts road", "'D*16' covers 16 raw frames, the sample videos"),
        (3, "", "is a text-to-video pipeline (a base model, or stage 1 fused); here belongs a controlled pipeline"),
        (3, "--frame_buckets 29", "29 frames do not make a condition frame and 4 equal groups"),
        (3, "--num_noise_groups 3", "num_noise_groups: 3 does not divide the 1000 timesteps"),
        (3, "--validation_num_inference_steps 6 --validation_prompts road", "6 steps do not divide among 4"),
        (4, "--num_solver_steps 12", "12 solver steps and 4 phases"),
    ],
)
def test_training_with_wrong_settings(launch, nothing_loaded, stage, words, message):
    assert message in launch(*words.split(), stage=stage)


def test_training_on_a_bad_index(launch, nothing_loaded, tiny_world, tmp_path):
    good = entries(tiny_world)
    for damage, message in (
        ({"caption": ""}, "entry 3: caption is ''"),
        ({"control_signal_seq": "D,UP"}, "entry 3: control_signal_seq: unknown control token 'UP' (item 2)"),
        ({"path": None}, "entry 3: path is None; it must be a text that is not empty"),
    ):
        index = write_index(tmp_path, [*good[:2], {**good[2], **damage}, good[3]])
        stage = 2 if "control_signal_seq" in damage else 1
        more = ["--control_dim", "12", "--control_start_layer", "1", "--control_end_layer", "3"] if stage == 2 else []
        assert f"{index}: {message}" in launch("--index_file", index, *more, stage=stage)
    index.write_text('{"list": [')
    assert "is not JSON" in launch("--index_file", index)


def audio_only(path: Path) -> None:
    sound = ["-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *sound, str(path)], check=True)


VIDEO_DAMAGE = {
    "missing": (Path.unlink, "there is no such video file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (lambda path: os.truncate(path, 2000), "is no readable video, or is truncated"),
    "audio only": (audio_only, "holds no pictures (audio only?)"),
    "text": (lambda path: path.write_text("not a video"), "is no readable video"),
}


@pytest.mark.parametrize("damage", VIDEO_DAMAGE)
@pytest.mark.parametrize("program", ["train", "precompute"])
def test_too_many_bad_videos(launch, nothing_loaded, tiny_world, tmp_path, damage, program):
    """Training stops before a model is loaded; what precompute has encoded by then is kept, whole."""
    shutil.copytree(tiny_world, tmp_path / "data")
    for entry in entries(tiny_world)[1:3]:
        VIDEO_DAMAGE[damage][0](tmp_path / "data" / entry["path"])
    words = ["--data_root", tmp_path / "data", "--num_validation_clips", 0, "--validation_steps", 0]
    words += ["--dataloader_num_workers", 0]
    if program == "train":
        line = launch(*words, "--train_batch_size", 4)
    else:
        line = launch(*words, "--latent_cache_dir", tmp_path / "cache", program=precompute.main)
        assert not list((tmp_path / "cache").glob("shard*.safetensors.tmp"))
    assert VIDEO_DAMAGE[damage][1] in line and "videos/0000" in line
    assert "more than max_unreadable_share 0.01 allows" in line and "index entry" in line


def test_clips_too_short_for_the_frames_asked_for(launch, nothing_loaded):
    line = launch("--frame_buckets", 65, "--validation_steps", 0, "--dataloader_num_workers", 0)
    assert "found no clip for 65 frames at 16 fps (4.00 s)" in line and "use fewer frames or longer clips" in line


def test_a_base_directory_without_a_component(launch, nothing_loaded, tiny_base, tmp_path):
    base = tmp_path / "base"
    for component, message in (
        ("vae", "incomplete: the component 'vae' is missing; copy it there whole"),
        ("transformer/config.json", "transformer holds no config of a CogVideoXTransformer3DModel"),
    ):
        shutil.copytree(tiny_base, base)
        path = base / component
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert message in launch("--pretrained_model_name_or_path", base)
        shutil.rmtree(base)
    base.mkdir()
    assert "model_index.json is missing (has the stage finished?)" in launch("--pretrained_model_name_or_path", base)
    (base / "pytorch_lora_weights.safetensors").touch()
    assert "fuse it first with stage1/fuse_lora_weights.py" in launch("--pretrained_model_name_or_path", base, stage=2)


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        (2, "stage3", "is a streaming pipeline (stage 3 or 4); here belongs a text-to-video pipeline"),
        (3, "stage3", "is a streaming pipeline (stage 3 or 4); here belongs a controlled pipeline"),
        (4, "stage2", "is a controlled pipeline (stage 2); here belongs a streaming pipeline"),
        (4, "stage4", "is distilled already (its scheduler is a CogVideoXSwinLCMScheduler); here belongs stage 3's"),
    ],
)
def test_a_directory_that_the_stage_before_did_not_make(launch, nothing_loaded, tiny_models, stage, given, message):
    assert message in launch("--pretrained_model_name_or_path", tiny_models / given, stage=stage)


def test_a_controlled_model_without_its_vocabulary(launch, nothing_loaded, tiny_models, tmp_path):
    shutil.copytree(tiny_models / "stage2", tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "control_vocabulary")
    line = launch("--pretrained_model_name_or_path", tmp_path / "base", stage=3)
    assert "the component 'control_vocabulary' is missing; stage 2 writes it" in line


def train_words(tiny_base: str, tiny_world: Path, output_dir: Path) -> list:
    config = ROOT / "stage1" / "training" / "miniworld_config.py"
    words = ["--config", config, *TINY.split(), "--validation_steps", 0, "--validation_index_file="]
    words += ["--pretrained_model_name_or_path", tiny_base, "--output_dir", output_dir]
    return [*words, "--data_root", tiny_world, "--index_file", tiny_world / "index.json"]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def stage1(tmp_path_factory, tiny_base, tiny_world) -> Path:
    """Stage 1 trained for one step."""
    output_dir = tmp_path_factory.mktemp("bad_input_stage1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, train_words(tiny_base, tiny_world, output_dir))])
        train.main()
    return output_dir


def test_resuming_with_other_settings(refused, stage1, tiny_base, tiny_world, tmp_path, nothing_loaded):
    words = train_words(tiny_base, tiny_world, stage1)
    before = contents(stage1)
    assert "learning_rate was 0.001, is 0.5" in refused(train.main, *words, "--learning_rate", 0.5)
    longer = ["--max_train_steps", 2]
    assert "was made with other settings: rank was 4, is 8; restore them or choose" in refused(
        train.main, *words, *longer, "--rank", 8, "--lora_alpha", 16
    )
    assert "train_batch_size × processes = 1, here it is 2 × 1" in refused(
        train.main, *words, *longer, "--train_batch_size", 2
    )
    assert contents(stage1) == before
    elsewhere = ["--output_dir", tmp_path / "out", "--resume_from_checkpoint", stage1 / "checkpoint-1", "--rank", 8]
    assert "rank was 4, is 8" in refused(train.main, *words, *elsewhere)
    assert not contents(tmp_path)
    shutil.copytree(stage1 / "checkpoint-1", tmp_path / "checkpoint-1")
    os.truncate(tmp_path / "checkpoint-1" / "state.json", 9)
    elsewhere[3] = tmp_path / "checkpoint-1"
    assert "checkpoint-1/state.json is missing or damaged; resume from" in refused(train.main, *words, *elsewhere)


def test_more_processes_than_clips(refused, tiny_base, tiny_world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # as scripts/launch.sh asks before it starts them
    line = refused(train.main, *train_words(tiny_base, tiny_world, tmp_path), "--check")
    assert "1 on 8 processes needs 8 clips at a time, the index has 3 for training beside 1 held out (num_" in line


def test_out_of_memory(refused, tiny_base, tiny_world, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(LoraObjective, "loss", fail)
    line = refused(train.main, *train_words(tiny_base, tiny_world, tmp_path / "out"))
    for setting in ("gradient_checkpointing", "latent_cache_dir", "frame_buckets [33]", "fsdp2.yaml"):
        assert setting in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_outputs_below_a_file(launch, nothing_loaded, tmp_path):
    """Not even root can write there."""
    file = tmp_path / "file"
    file.touch()
    where = f"{file} is no directory; choose another"
    assert where in launch("--output_dir", file / "out")
    assert where in launch("--latent_cache_dir", file / "out", program=precompute.main)


def test_an_output_over_the_base(launch, nothing_loaded, tiny_base, tmp_path):
    (tmp_path / "link").symlink_to(tiny_base)
    line = launch("--output_dir", tmp_path / "link")
    assert "output_dir: " in line and "is the model that the run starts from; choose another directory" in line
