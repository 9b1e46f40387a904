"""`common.tools.train` in this process: the dry run, and what it says of wrong settings."""

import json
from pathlib import Path

import pytest

from common.config.errors import UserError
from common.tools import train

CONFIG = str(Path(__file__).with_name("toy_config.py"))


@pytest.fixture
def launch(toy_data, tmp_path, monkeypatch):
    def call(*words):
        monkeypatch.setenv("TOY_DATA", str(toy_data))
        monkeypatch.setenv("TOY_OUTPUT", str(tmp_path / "run"))
        monkeypatch.setattr("sys.argv", ["train", "--config", CONFIG, *words])
        train.main()

    return call


def test_dry_run_prints_settings_and_sizes_and_writes_nothing(launch, tmp_path, capsys):
    launch("--dry_run", "--fps", "8")
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["fps"] == 8 and shown["model"] == {"trained parameters": 412}
    assert shown["data"]["training_clips"] == 11 and shown["data"]["optimizer_steps_per_epoch"] == 5.5
    assert not (tmp_path / "run").exists()


def test_training_needs_its_files_and_a_dry_run_does_not(launch, tmp_path):
    with pytest.raises(UserError, match="index_file.*nowhere.json does not exist"):
        launch("--index_file", "nowhere.json")
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_reports_a_wrong_setting(launch, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        launch("--learning_rat", "1")
    assert left.value.code == 2 and capsys.readouterr().err == ""


def test_launch_line_trains(launch, tmp_path):
    launch("--max_train_steps", "2")
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert saved["max_train_steps"] == 2 and (tmp_path / "run" / "exported.safetensors").is_file()
