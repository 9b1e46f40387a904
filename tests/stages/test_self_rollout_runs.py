"""Runs of self-rollout: resumed, recorded, refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_component
from common.config.errors import UserError
from common.config.loader import load_settings
from common.tools.precompute import precompute
from common.training.random import SampleRandom
from common.training.step_graph import EAGER_STEPS
from common.training.trainer import Trainer
from tests.stages.conftest import TINY, random_batch, read_metrics
from tests.stages.test_self_rollout import CONFIG, B, C, F, H, W
from tests.stages.test_self_rollout import load_self_rollout as load


@pytest.fixture(scope="module")
def stage4(tiny_stages) -> Path:
    return tiny_stages.run(4)


def train(tiny_stages, stage4: Path, output_dir: Path, *overrides: str) -> Path:
    paths = {
        "pretrained_model_name_or_path": stage4.with_name("stage3"), "student_model_name_or_path": stage4,
        "output_dir": output_dir, "data_root": tiny_stages.world, "index_file": tiny_stages.world / "index.json",
        "validation_index_file": tiny_stages.world / "heldout.json",
    }  # fmt: skip
    words = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    more = ["--frame_buckets", "33", "--window_frames", "17", "33", "--rollouts_per_stream", "2"]
    settings = load_settings(CONFIG, [*words, *TINY.split(), "--validation_prompts", *more, *overrides])
    settings.check_files()
    Trainer(settings, settings.build_objective()).train()
    return output_dir


def test_a_resumed_run_equals_an_unbroken_one_and_leaves_a_stage_4(tiny_stages, stage4, tmp_path):
    unbroken = train(tiny_stages, stage4, tmp_path / "unbroken")
    resumed = train(tiny_stages, stage4, tmp_path / "resumed", "--max_train_steps", "3", "--lr_scheduler", "constant")
    constant = train(tiny_stages, stage4, tmp_path / "constant", "--lr_scheduler", "constant")
    train(tiny_stages, stage4, resumed, "--lr_scheduler", "constant")
    for name in ("weights", "optimizer", "target", "streams"):
        expected, got = (load_file(run / "checkpoint-6" / f"{name}.safetensors") for run in (constant, resumed))
        assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected), name
    assert {key.split(".")[0] for key in expected} == {"5", "9"}

    lines = read_metrics(unbroken)
    assert {"critic_loss", "score_gap", "loss"} <= lines[1].keys() and "validation/loss" in lines[-1]
    chunk = next(CogVideoXStreamingPipeline.from_pretrained(unbroken).stream("a car", control="D", height=32, width=64))
    assert chunk.shape == (9, 32, 64, 3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adamw_8bit --step_in_backward"])
def test_student_and_critic_move_by_their_own_rates(tiny_stages, stage4, tmp_path, optimizer):
    """After one step of AdamW no weight has moved further than its rate (but for rounding), and most as far."""
    words = f"--max_train_steps 1 --validation_steps 0 --lr_scheduler constant --weight_decay 0 --optimizer {optimizer}"
    rates = {"student": 1e-2, "critic": 4e-2}
    words += f" --learning_rate {rates['student']} --critic_learning_rate {rates['critic']}"
    words += " --teacher_control_guidance_scale 3"  # or the scores would not differ before the critic has learnt
    run = train(tiny_stages, stage4, tmp_path / "run", *words.split())
    trained = load_file(run / "checkpoint-1" / "weights.safetensors")
    for role, base in (("student", stage4), ("critic", stage4.with_name("stage3"))):
        before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
        moved = torch.cat([(trained[f"{role}.{name}"].float() - before[name]).abs().flatten() for name in before])
        assert moved.max() < 1.1 * rates[role] and moved.median() > 0.5 * rates[role], (
            role,
            moved.max(),
            moved.median(),
        )


def test_a_recorded_step_finds_its_streams_where_they_were(tiny_stages, stage4, tiny_models, tmp_path):
    """On the CPU nothing is replayed, but the step works in the same fixed memory as on a GPU."""
    objective, batch = load(tiny_models), random_batch(B, F, C, H, W)
    places = []
    for step in range(2):
        with torch.no_grad():
            objective.roll_out(batch, SampleRandom(0, step, range(B)))
        places.append([value.data_ptr() for value in vars(objective.streams[F]).values()])
    assert places[0] == places[1]
    cached = ["--max_train_steps", str(2 * EAGER_STEPS + 3), "--validation_steps", "0", "--windows_per_clip", "1"]
    cached += ["--latent_cache_dir", str(tmp_path / "latents"), "--frame_buckets", "33"]
    precompute(tiny_stages.settings(4, tmp_path / "any", *cached))
    runs = [
        train(tiny_stages, stage4, tmp_path / name, *cached, *option)
        for name, option in (("plain", []), ("recorded", ["--cuda_graph"]))
    ]
    for name in ("weights", "streams"):
        plain, recorded = (load_file(next(run.glob(f"checkpoint-*/{name}.safetensors"))) for run in runs)
        assert plain.keys() == recorded.keys() and all(torch.equal(plain[key], recorded[key]) for key in plain), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank 4", "rank.*students are whole"),
        ("--huber_c 0.1", "huber_c: is for distillation.*leave it at 0.01"),
        ("--uniform_timestep_share 0", "uniform_timestep_share"),
        ("--control_dropout 0", "control_dropout"),
        ("--guidance_range 2 6 --cond_proj_dim 16", "cond_proj_dim"),
        ("--optimizer muon", "optimizer.*'adamw'"),
        ("--key_press_share 0.5", "key_press_share.*live_share.*leave it at 0.0"),
        ("--offset_noise 0.3", "offset_noise.*leave it at 0.0"),
        ("--height_buckets 64 96", "height_buckets.*give one"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps"),
        ("--critic_learning_rate 0", "critic_learning_rate"),
        ("--rollouts_per_stream 0.5", "rollouts_per_stream"),
        ("--learnt_share 1.5", "learnt_share"),
        ("--held_share -1", "held_share"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_settings(CONFIG, words.split())


def test_a_student_that_does_not_fit_is_refused(tiny_models, tmp_path):
    with pytest.raises(UserError, match="not distilled.*DPMScheduler.*here belongs stage 4"):
        load(tiny_models, "--student_model_name_or_path", str(tiny_models / "stage3"))
    with pytest.raises(UserError, match="phases_per_group.*is 2.*was made with 1"):
        load(tiny_models, "--phases_per_group", "2")
    other = tmp_path / "other"
    shutil.copytree(tiny_models / "stage4", other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    (other / "transformer" / "config.json").write_text(json.dumps(config | {"control_tokens_per_frame": 8}))
    with pytest.raises(UserError, match="no student of this teacher.*differ in control_tokens_per_frame"):
        load(tiny_models, "--student_model_name_or_path", str(other))
    settings = load_settings(CONFIG, ["--student_model_name_or_path", ""])
    settings.pretrained_model_name_or_path, settings.output_dir = str(tiny_models / "stage3"), str(tmp_path / "new")
    settings.data_root = settings.index_file = settings.validation_index_file = str(tiny_models)
    for student, message in (
        ("", "is not set"),
        ("nowhere", "nowhere is no directory"),
        (settings.output_dir, "output_dir"),
    ):
        settings.student_model_name_or_path = student
        (tmp_path / "new").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            settings.check_files()


def test_a_student_of_other_noise_or_signals_is_refused(tiny_models, tmp_path):
    def refusal(name: str) -> str:
        with pytest.raises(UserError, match="no student of this teacher") as error:
            load(tiny_models, "--student_model_name_or_path", str(tmp_path / name))
        return str(error.value)

    for name in ("noise", "signals"):
        shutil.copytree(tiny_models / "stage4", tmp_path / name)
    path = tmp_path / "noise" / "scheduler" / "scheduler_config.json"
    changes = {"snr_shift_scale": 1.0, "beta_end": 0.02, "frames_per_group": 7}  # the last is no matter of noise
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert refusal("noise").endswith("their schedulers differ in beta_end, snr_shift_scale")
    known = load_component(tiny_models / "stage4", "control_vocabulary")
    packed = shutil.copytree(tiny_models / "stage4", tmp_path / "packed") / "control_vocabulary"
    ControlVocabulary(known.names, known.table.half(), known.null.half(), known.label).save_pretrained(packed)
    load(tiny_models, "--student_model_name_or_path", str(tmp_path / "packed"))
    for changes, named in (
        ({"table": known.table.flip(0)}, "table"),
        ({"null": known.null + 1, "label": "mean"}, "label, null"),
        ({"names": known.names[::-1]}, "names"),
    ):
        parts = {part: getattr(known, part) for part in ("names", "table", "null", "label")} | changes
        ControlVocabulary(**parts).save_pretrained(tmp_path / "signals" / "control_vocabulary")
        assert refusal("signals").endswith(f"their control vocabularies differ in {named}")


def test_another_share_of_a_finished_run_is_exported_anew(tiny_stages, stage4, tmp_path):
    exported = {}
    for share in (0.25, 1.0):
        options = ["--max_train_steps", "2", "--validation_steps", "0", "--learnt_share", str(share)]
        run = train(tiny_stages, stage4, tmp_path / "run", *options)
        exported[share] = load_file(run / "transformer" / "diffusion_pytorch_model.safetensors")
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == [1, 2]  # nothing was trained again
    start = load_file(stage4 / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(exported[1.0][name], start[name]) for name in start)
    for name, value in start.items():
        torch.testing.assert_close(exported[0.25][name], value.lerp(exported[1.0][name], 0.25))


def test_a_teacher_that_knows_no_windows_is_warned_of(tiny_models, tmp_path, caplog):
    teacher = tmp_path / "stage3"
    shutil.copytree(tiny_models / "stage3", teacher)
    for windows, said in (([17], False), ([], True)):
        (teacher / "settings.json").write_text(json.dumps({"window_frames": windows}))
        load(tiny_models, "--pretrained_model_name_or_path", str(teacher))
        assert ("trained without window_frames" in caplog.text) == said


def test_what_was_made_from_another_student_is_not_called_finished(tiny_stages, stage4, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(stage4, student)
    short = ["--max_train_steps", "1", "--validation_steps", "0", "--student_model_name_or_path", str(student)]
    train(tiny_stages, stage4, tmp_path / "run", *short)
    weights = student / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="student, whose transformer has changed since"):
        train(tiny_stages, stage4, tmp_path / "run", *short)
