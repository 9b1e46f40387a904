"""Checkpoints: whole or absent, the newest kept, and refused by a run that trains something else."""

import json
import shutil

import pytest
import torch
from toy import toy_settings

from common.config.errors import UserError
from common.training import checkpoints
from common.training.checkpoints import find_checkpoint, list_checkpoints, write_checkpoint
from common.training.trainer import Trainer

TENSORS = {"weights": {"w": torch.arange(3.0)}, "optimizer": {"exp_avg:w": torch.ones(3)}}


def write(settings, output_dir, step):
    return write_checkpoint(output_dir, step, TENSORS, {"samples_per_micro_step": 2}, settings)


@pytest.fixture
def settings(toy_data, tmp_path):
    return toy_settings(toy_data, tmp_path)


def train(settings):
    Trainer(settings, settings.build_objective()).train()


def test_written_checkpoint_reads_back(settings, tmp_path):
    path = write(settings, tmp_path, 7)
    assert list_checkpoints(tmp_path) == [(7, path)] and checkpoints.read_state(path)["step"] == 7
    assert torch.equal(checkpoints.read_tensors(path, "weights")["w"], torch.arange(3.0))
    assert json.loads((path / "settings.json").read_text()) == settings.to_dict()


@pytest.mark.parametrize("calls_before_the_end", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_process_ended_while_saving_leaves_the_previous_checkpoints(
    settings, tmp_path, monkeypatch, calls_before_the_end
):
    """Every system call that changes the disk is, in turn, the first that is not made any more."""
    write(settings, tmp_path, 1)
    write(settings, tmp_path, 2)
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > calls_before_the_end:
                raise SystemExit
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(checkpoints, "save_file", counted(checkpoints.save_file))
    monkeypatch.setattr(checkpoints, "flush_to_disk", counted(checkpoints.flush_to_disk))
    monkeypatch.setattr(checkpoints.Path, "rename", counted(checkpoints.Path.rename))
    monkeypatch.setattr(checkpoints.shutil, "rmtree", counted(shutil.rmtree))
    try:
        write(settings, tmp_path, 3)
        checkpoints.keep_newest(tmp_path, 1)
    except SystemExit:
        pass
    monkeypatch.undo()

    found = list_checkpoints(tmp_path)
    assert found and found[-1][0] in (2, 3)
    for _, path in found:
        assert checkpoints.read_tensors(path, "weights").keys() == {"w"}
        assert checkpoints.read_tensors(path, "optimizer") and (path / "settings.json").is_file()
    checkpoints.remove_leftovers(tmp_path)
    assert all(checkpoints.NAME.fullmatch(path.name) for path in tmp_path.iterdir())


def test_limit_keeps_the_newest_by_number(settings, tmp_path):
    for step in (9, 10, 100):
        write(settings, tmp_path, step)
    checkpoints.keep_newest(tmp_path, None)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100]
    checkpoints.keep_newest(tmp_path, 2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 100]


def test_run_keeps_to_its_limit(toy_data, tmp_path):
    train(toy_settings(toy_data, tmp_path, checkpointing_steps=1, checkpoints_total_limit=2, max_train_steps=5))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]


def test_what_resume_from_checkpoint_means(settings, tmp_path):
    assert find_checkpoint(settings) is None  # "latest" of nothing is a new run
    write(settings, tmp_path, 5)
    write(settings, tmp_path, 10)
    (tmp_path / "checkpoint-11.tmp").mkdir()
    (tmp_path / "checkpoint-12").mkdir()  # empty: not one of ours
    assert find_checkpoint(settings).name == "checkpoint-10"
    settings.resume_from_checkpoint = str(tmp_path / "checkpoint-10")
    assert find_checkpoint(settings).name == "checkpoint-10"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none", "checkpoint-10 is from a run that went beyond step 0"),
        ("checkpoint-5", "checkpoint-10 is from a run that went beyond step 5"),
        ("checkpoint-6", "checkpoint-6 is not a checkpoint directory; .* has checkpoint-5, checkpoint-10"),
    ],
)
def test_mixing_two_runs_in_one_directory_is_refused(settings, tmp_path, value, message):
    write(settings, tmp_path, 5)
    write(settings, tmp_path, 10)
    settings.resume_from_checkpoint = value if value == "none" else str(tmp_path / value)
    with pytest.raises(UserError, match=message):
        find_checkpoint(settings)


@pytest.mark.parametrize("resume", ["latest", "none"])
def test_result_whose_checkpoints_were_removed_is_not_replaced_unasked(toy_data, tmp_path, resume):
    train(toy_settings(toy_data, tmp_path, max_train_steps=2))
    shutil.rmtree(tmp_path / "checkpoint-2")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    longer = toy_settings(toy_data, tmp_path, max_train_steps=3, resume_from_checkpoint=resume)
    with pytest.raises(UserError, match=f"output_dir: {tmp_path} holds the result of a run of 2 steps.* checkpoint-2"):
        train(longer)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    (tmp_path / "training_finished.json").unlink()
    train(longer)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]


def test_a_pipeline_that_no_training_made_is_not_replaced(toy_data, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"output_dir: {tmp_path} holds a pipeline that no training made"):
        train(toy_settings(toy_data, tmp_path, max_train_steps=1))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["model_index.json"]


def test_other_training_clips_are_noticed_though_the_held_out_ones_stay(toy_data, tmp_path, caplog):
    entries = json.loads((toy_data / "index.json").read_text())["list"]
    paths = {name: str(tmp_path / f"{name}.json") for name in ("index_file", "validation_index_file")}
    (tmp_path / "validation_index_file.json").write_text(json.dumps({"list": entries[12:]}))
    indices = {"first": entries[:8], "the same": entries[:8], "more": entries[:9], "in another order": entries[8::-1]}
    for step, (name, listed) in enumerate(indices.items(), 1):
        caplog.clear()
        (tmp_path / "index_file.json").write_text(json.dumps({"list": listed}))
        train(toy_settings(toy_data, tmp_path / "run", **paths, max_train_steps=step, validation_steps=1))
        said = {"more": "(8 then, 9 now)", "in another order": "(9 then, 9 now)"}.get(name)
        assert (said or "") in caplog.text and ("training clips are not those of" in caplog.text) == bool(said), name

    state = tmp_path / "run" / "checkpoint-4" / "state.json"
    saved = json.loads(state.read_text())
    del saved["training_clips"]  # as before it was written down
    state.write_text(json.dumps(saved))
    caplog.clear()
    (tmp_path / "index_file.json").write_text(json.dumps({"list": entries[:8]}))
    train(toy_settings(toy_data, tmp_path / "run", **paths, max_train_steps=5))
    assert not caplog.text


def test_other_settings_are_refused_each_by_name(toy_data, tmp_path):
    train(toy_settings(toy_data, tmp_path, max_train_steps=2))
    other = toy_settings(toy_data, tmp_path, seed=1, weight_decay=0.5, frame_buckets=[5], max_train_steps=3)
    with pytest.raises(UserError) as error:
        train(other)
    for difference in ("seed was 42, is 1", "weight_decay was 0.001, is 0.5", "frame_buckets was [9], is [5]"):
        assert difference in str(error.value)
    assert "max_train_steps" not in str(error.value) and "\n" not in str(error.value)


def test_other_batch_over_all_processes_is_refused(toy_data, tmp_path):
    train(toy_settings(toy_data, tmp_path, max_train_steps=2))
    with pytest.raises(UserError, match="train_batch_size × processes = 2, here it is 3 × 1"):
        train(toy_settings(toy_data, tmp_path, max_train_steps=3, train_batch_size=3))


def test_end_of_the_run_may_move_only_if_the_learning_rate_does_not_depend_on_it(toy_data, tmp_path):
    train(toy_settings(toy_data, tmp_path, max_train_steps=2, lr_scheduler="cosine"))
    with pytest.raises(UserError, match="max_train_steps was 2, is 3"):
        train(toy_settings(toy_data, tmp_path, max_train_steps=3, lr_scheduler="cosine"))


def test_settings_that_change_nothing_learnt_may_change(toy_data, tmp_path):
    train(toy_settings(toy_data, tmp_path / "a", max_train_steps=2))
    shutil.move(tmp_path / "a", tmp_path / "b")
    changed = {
        "logging_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": None, "dataloader_num_workers": 1,
        "validation_steps": 2, "validation_prompts": ["x"], "gradient_checkpointing": True, "max_unreadable_share": 0.5,
    }  # fmt: skip
    train(toy_settings(toy_data, tmp_path / "b", max_train_steps=3, **changed))
    assert [step for step, _ in list_checkpoints(tmp_path / "b")] == [2, 3]


def test_moved_tree_of_data_and_runs_is_the_same_run(toy_data, tmp_path):
    shutil.copytree(toy_data, tmp_path / "old" / "data")
    train(toy_settings(tmp_path / "old" / "data", tmp_path / "old" / "run", max_train_steps=2))
    shutil.move(tmp_path / "old", tmp_path / "new")
    train(toy_settings(tmp_path / "new" / "data", tmp_path / "new" / "run", max_train_steps=3))
    assert (tmp_path / "new" / "run" / "checkpoint-3").is_dir()
    with pytest.raises(UserError, match="data_root was .*, is "):
        train(toy_settings(toy_data, tmp_path / "new" / "run", max_train_steps=4))


def test_base_that_was_trained_anew_is_noticed_by_finished_and_by_resumed_runs(toy_data, tmp_path, caplog):
    shutil.copytree(toy_data, tmp_path / "old" / "base")
    weights = {"w": torch.arange(3.0)}
    (tmp_path / "old" / "base" / "transformer").mkdir()
    checkpoints.save_file(weights, tmp_path / "old" / "base" / "transformer" / "model.safetensors")

    def run(root, last):
        train(toy_settings(root / "base", root / "run", max_train_steps=last))

    run(tmp_path / "old", 2)
    shutil.copytree(tmp_path / "old", tmp_path / "new")  # copied as a whole: new times, the same content
    with caplog.at_level("INFO"):
        run(tmp_path / "new", 2)
    assert "is finished; nothing to do" in caplog.text
    run(tmp_path / "new", 3)
    checkpoints.save_file({"w": torch.ones(3)}, tmp_path / "new" / "base" / "transformer" / "model.safetensors")
    for where in ("run", "run/checkpoint-3"):
        with pytest.raises(UserError, match=f"{where} was trained from .*/base, whose transformer has changed since; "):
            run(tmp_path / "new", 3)
        (tmp_path / "new" / "run" / "training_finished.json").unlink(missing_ok=True)

    state = tmp_path / "new" / "run" / "checkpoint-3" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"base": "as an earlier version hashed it"}))
    run(tmp_path / "new", 4)


def test_weights_of_another_model_are_refused(toy_data, tmp_path):
    train(toy_settings(toy_data, tmp_path, max_train_steps=2))
    path = tmp_path / "checkpoint-2" / "weights.safetensors"
    weights = checkpoints.load_file(path)
    del weights["1.bias"]
    checkpoints.save_file(weights, path)
    with pytest.raises(UserError, match="checkpoint-2 does not fit this model: it lacks 1.bias"):
        train(toy_settings(toy_data, tmp_path, max_train_steps=3))
