"""The training loop on a toy objective and real video files: resuming, logs, validation, and what it refuses."""

import json
import math

import imageio
import pytest
import torch
from safetensors.torch import load_file
from toy import ToyObjective, toy_settings

from common.config.errors import UserError
from common.data.loader import build_train_loader
from common.tools.contact_sheet import make_contact_sheet, read_signals
from common.training import checkpoints
from common.training.random import seed_everything
from common.training.trainer import Trainer
from common.training.validation import VALIDATION_SEED


def train(data, output_dir, accident: dict | None = None, **changes) -> None:
    """A whole run. `accident`: attributes of ToyObjective, for what goes wrong in it."""
    settings = toy_settings(data, output_dir, **changes)
    objective = settings.build_objective()
    vars(objective).update(accident or {})
    Trainer(settings, objective).train()


def log_lines(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


def assert_same_checkpoint(one, other) -> None:
    for name in ("weights", "optimizer", "ema"):
        a, b = load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert a.keys() == b.keys() and a
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"


RESUMED = {
    "prolonged": {"max_train_steps": 5},
    "stopped by SIGTERM, learning rate depends on the end": {"accident": {"signal_step": 5}, "lr_scheduler": "cosine"},
}


@pytest.mark.parametrize("first_run", RESUMED.values(), ids=RESUMED.keys())
def test_resumed_run_equals_unbroken_run_bit_for_bit(toy_data, tmp_path, first_run):
    # Log lines every 3 steps: the one at step 6 covers steps of both runs. Dropout draws from the global generator.
    common = {"gradient_accumulation_steps": 2, "logging_steps": 3, "dropout": 0.5, "max_train_steps": 10}
    common |= {"lr_scheduler": first_run.get("lr_scheduler", "constant_with_warmup")}
    train(toy_data, tmp_path / "whole", **common)
    train(toy_data, tmp_path / "parts", **{**common, **first_run})
    assert (tmp_path / "parts" / "checkpoint-5").is_dir()
    (tmp_path / "parts" / "checkpoint-7.tmp").mkdir()  # left by a killed run
    train(toy_data, tmp_path / "parts", **common)

    assert_same_checkpoint(tmp_path / "whole" / "checkpoint-10", tmp_path / "parts" / "checkpoint-10")
    assert not (tmp_path / "parts" / "checkpoint-7.tmp").exists()
    keys = ("step", "loss", "grad_norm", "lr", "mean_t")
    whole, parts = ([{k: line[k] for k in keys} for line in log_lines(tmp_path / d)] for d in ("whole", "parts"))
    if "max_train_steps" in first_run:
        parts = [line for line in parts if line["step"] != 5]  # the first run's last line
        whole, parts = whole[:1] + whole[2:], parts[:1] + parts[2:]  # and what it leaves to the next one
    assert parts == whole


def test_stopped_run_has_not_exported_and_finished_run_is_not_repeated(toy_data, tmp_path, monkeypatch):
    train(toy_data, tmp_path, accident={"signal_step": 2})
    assert not (tmp_path / "exported.safetensors").exists()
    train(toy_data, tmp_path)
    exported = load_file(tmp_path / "exported.safetensors")
    trained = load_file(tmp_path / "checkpoint-4" / "weights.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in trained.items())

    monkeypatch.setattr(ToyObjective, "load", lambda *_: pytest.fail("a finished run loads nothing"))
    train(toy_data, tmp_path)
    with pytest.raises(UserError, match="learning_rate was 0.01, is 0.5"):
        train(toy_data, tmp_path, learning_rate=0.5)


def test_only_trained_parameters_change_and_are_checkpointed(toy_data, tmp_path):
    train(toy_data, tmp_path, checkpointing_steps=1)
    first, last = (load_file(tmp_path / f"checkpoint-{n}" / "weights.safetensors") for n in (2, 4))
    assert set(last) == {"1.weight", "1.bias", "4.weight", "4.bias"}  # not the frozen "0"
    assert all(not torch.equal(first[key], last[key]) for key in last)
    untrained = ToyObjective(toy_settings(toy_data, tmp_path))
    seed_everything(42)
    untrained.load(torch.device("cpu"), torch.float32)
    exported = load_file(tmp_path / "exported.safetensors")
    assert torch.equal(exported["0.weight"], untrained.module[0].weight)


def test_accumulated_micro_steps_equal_one_larger_batch(toy_data, tmp_path):
    train(toy_data, tmp_path / "large", train_batch_size=4)
    train(toy_data, tmp_path / "small", train_batch_size=1, gradient_accumulation_steps=4)
    large, small = (load_file(tmp_path / d / "checkpoint-4" / "weights.safetensors") for d in ("large", "small"))
    for key in large:
        torch.testing.assert_close(small[key], large[key], atol=1e-6, rtol=1e-6)


def test_learning_rate_follows_the_warmup(toy_data, tmp_path):
    train(toy_data, tmp_path, lr_warmup_steps=4, learning_rate=0.008, max_train_steps=6)
    # Step k+1 takes k/4 of the peak in the warm-up.
    assert [line["lr"] for line in log_lines(tmp_path)] == pytest.approx([0.0, 0.002, 0.004, 0.006, 0.008, 0.008])


def test_run_asked_to_end_before_where_it_is_ends_there(toy_data, tmp_path):
    train(toy_data, tmp_path, max_train_steps=8, accident={"signal_step": 5})
    train(toy_data, tmp_path, max_train_steps=3)
    exported, trained = (load_file(tmp_path / n) for n in ("exported.safetensors", "checkpoint-5/weights.safetensors"))
    assert all(torch.equal(exported[key], value) for key, value in trained.items())


def test_weight_decay_is_applied(toy_data, tmp_path):
    norms = []
    for decay in (0.0, 10.0):
        train(toy_data, tmp_path / str(decay), weight_decay=decay, max_train_steps=3)
        norms.append(
            load_file(tmp_path / str(decay) / "checkpoint-3" / "weights.safetensors")["1.weight"].norm().item()
        )
    assert norms[1] == pytest.approx((1 - 0.1 / 3) * (1 - 0.2 / 3) * norms[0], rel=0.02)  # rates 0, 1/3, 2/3 of 0.01


def test_log_has_rates_after_the_first_steps_and_goes_to_tensorboard(toy_data, tmp_path):
    train(toy_data, tmp_path, max_train_steps=6, report_to="tensorboard")
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "loss", "grad_norm", "lr", "s_per_step", "data_wait", "video_tokens_per_s", "mfu", "peak_memory_gib", "mean_t",
    }  # fmt: skip
    assert all(wanted <= line.keys() for line in lines)
    assert [line["s_per_step"] is None for line in lines] == [True, True, False, False, False, False]
    for line in lines[2:]:
        tokens = 2 * 3 * 2 * 2  # batch 2, 3 latent frames of 2×2
        assert line["video_tokens_per_s"] == pytest.approx(tokens / line["s_per_step"])
        assert 0.05 < line["peak_memory_gib"] < 64 and line["mfu"] is None  # no peak is known of a CPU

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)


def test_logged_loss_is_the_mean_since_the_last_line(toy_data, tmp_path):
    train(toy_data, tmp_path / "each", max_train_steps=4)
    train(toy_data, tmp_path / "pairs", max_train_steps=4, logging_steps=2)
    each = [line["loss"] for line in log_lines(tmp_path / "each")]
    pairs = [line["loss"] for line in log_lines(tmp_path / "pairs")]
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-6)


def test_loss_that_is_not_finite_names_step_and_batch_and_spares_the_checkpoint(toy_data, tmp_path):
    settings = {"max_train_steps": 20, "logging_steps": 10, "checkpointing_steps": 2}
    loader = build_train_loader(toy_settings(toy_data, tmp_path), needs_control=False, start_step=3)
    samples = next(iter(loader))["sample_ids"]
    with pytest.raises(UserError, match=f"the loss is not finite at step 4, on the batch {', '.join(samples)};"):
        train(toy_data, tmp_path, accident={"poison_step": 3}, **settings)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [2]
    weights = load_file(tmp_path / "checkpoint-2" / "weights.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_out_of_memory_names_the_settings_that_help(toy_data, tmp_path):
    with pytest.raises(UserError) as error:
        train(toy_data, tmp_path, accident={"out_of_memory_step": 1})
    for word in (
        "train_batch_size (now 2)",
        "gradient_checkpointing",
        "latent_cache_dir",
        "frame_buckets [9]",
        "[2, 3,",
    ):
        assert word in str(error.value)


def test_output_directory_that_cannot_be_written_is_refused_before_loading(toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyObjective, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: .*file/run cannot be written"):
        train(toy_data, tmp_path / "file" / "run")


def test_validation_is_the_same_for_every_batch_size_and_writes_videos(toy_data, tmp_path):
    common = {"validation_steps": 2, "validation_prompts": ["a road", "a field"], "learning_rate": 1e-9}
    for size in (1, 2, 3):
        report_to = "tensorboard" if size == 1 else "none"
        train(toy_data, tmp_path / str(size), train_batch_size=size, report_to=report_to, **common)
    curves = {
        size: {line["step"]: line["validation/loss"] for line in log_lines(tmp_path / str(size)) if "lr" not in line}
        for size in (1, 2, 3)
    }
    assert list(curves[1]) == [0, 2, 4]
    assert curves[2] == pytest.approx(curves[1], rel=1e-4) and curves[3] == pytest.approx(curves[1], rel=1e-4)
    assert curves[1][0] == pytest.approx(curves[1][4], rel=1e-4)  # next to nothing was learnt, and nothing else moved

    videos = sorted(path.name for path in (tmp_path / "1" / "validation").glob("*.mp4"))
    assert videos == ["step-2-0.mp4", "step-2-1.mp4", "step-4-0.mp4", "step-4-1.mp4"]
    about = json.loads((tmp_path / "1" / "validation" / "step-4-1.json").read_text())
    assert about == {"prompt": "a field", "control": None, "seed": VALIDATION_SEED + 1, "step": 4}
    assert len(imageio.mimread(tmp_path / "1" / "validation" / videos[0], format="FFMPEG")) == 9

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "1" / "logs" / "tensorboard")).Reload()
    image = events.Images("validation/0: a road")[-1]
    assert image.step == 4 and image.encoded_image_string.startswith(b"GIF89a")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_out_of_memory_names_the_optimizer_that_takes_less(toy_data, tmp_path, optimizer):
    with pytest.raises(UserError, match="out of memory") as error:
        train(toy_data, tmp_path, accident={"out_of_memory_step": 1}, optimizer=optimizer)
    assert ("optimizer = 'adamw_8bit'" in str(error.value)) == (optimizer == "adamw")


def test_run_killed_before_its_first_checkpoint_logs_step_0_once(toy_data, tmp_path):
    with pytest.raises(UserError, match="out of memory"):
        train(toy_data, tmp_path, accident={"out_of_memory_step": 3}, validation_steps=4)
    assert [line["step"] for line in log_lines(tmp_path)] == [0, 1, 2, 3]
    train(toy_data, tmp_path, validation_steps=4)
    assert [line["step"] for line in log_lines(tmp_path)] == [0, 1, 2, 3, 4, 4]


def test_sample_videos_with_control_go_into_a_contact_sheet(toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(ToyObjective, "needs_control", True)
    changes = {"validation_steps": 4, "validation_prompts": ["a road"], "validation_control": "D*4,DL*5"}
    train(toy_data, tmp_path, report_to="tensorboard", **changes)
    video = tmp_path / "validation" / "step-4-0.mp4"
    assert read_signals(video) == ["D"] * 4 + ["DL"] * 5
    assert make_contact_sheet([("toy", video)], num_columns=3).height == 96

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["validation/0: a road (D*4,DL*5)"]


def test_clips_added_to_the_index_in_mid_run_are_noticed(toy_data, tmp_path, caplog):
    index = tmp_path / "index.json"
    entries = json.loads((toy_data / "index.json").read_text())["list"]
    for number, said in ((12, False), (12, False), (14, True)):
        index.write_text(json.dumps({"list": entries[:number]}))
        steps = 1 + len(list(tmp_path.glob("run/checkpoint-*")))
        train(toy_data, tmp_path / "run", index_file=str(index), max_train_steps=steps, validation_steps=1)
        assert ("clips were 9.mp4" in caplog.text and "now they are 11.mp4" in caplog.text) == said


def test_validation_does_not_change_training(toy_data, tmp_path):
    train(toy_data, tmp_path / "with", validation_steps=1, validation_prompts=["a road"], dropout=0.5)
    train(toy_data, tmp_path / "without", validation_steps=0, dropout=0.5)
    assert_same_checkpoint(tmp_path / "with" / "checkpoint-4", tmp_path / "without" / "checkpoint-4")


@pytest.mark.parametrize("clips", [3, 0], ids=["held-out loss", "sample video alone"])
@pytest.mark.parametrize("stopped", [2, 4], ids=["in between", "at the end"])
def test_validation_due_where_the_run_was_stopped_is_made_once_when_it_goes_on(toy_data, tmp_path, stopped, clips):
    common = {"validation_steps": 2, "validation_prompts": ["a road"], "num_validation_clips": clips}
    train(toy_data, tmp_path, accident={"signal_step": stopped}, **common)
    video = tmp_path / "validation" / f"step-{stopped}-0.mp4"
    assert not video.exists() and not (tmp_path / "exported.safetensors").exists()
    train(toy_data, tmp_path, **common)
    made = video.stat().st_mtime_ns
    train(toy_data, tmp_path, **common, max_train_steps=6)
    assert [line["step"] for line in log_lines(tmp_path) if "validation/loss" in line] == [0, 2, 4, 6][
        : 4 * bool(clips)
    ]
    assert video.stat().st_mtime_ns == made


def test_failing_sample_stops_the_run_after_its_checkpoint(toy_data, tmp_path):
    with pytest.raises(RuntimeError, match="sampling failed"):
        train(toy_data, tmp_path, validation_steps=2, checkpointing_steps=2, validation_prompts=["fail"])
    assert (tmp_path / "checkpoint-2").is_dir()


def test_toy_learns(toy_data, tmp_path):
    train(toy_data, tmp_path, max_train_steps=60, train_batch_size=8, learning_rate=3e-2)
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and all(map(math.isfinite, losses))
