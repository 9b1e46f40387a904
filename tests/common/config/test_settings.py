"""Settings: every mistake a user can make is refused where it is made, in one line, before torch is imported."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from common.config.errors import UserError
from common.config.fields import PathSetting
from common.config.loader import load_settings, parse_launch_line
from common.config.settings import TrainingSettings, setting_types
from common.tools.train import OUT_OF_MEMORY_HELP


@dataclass
class StageSettings(TrainingSettings):
    """What a stage adds."""

    control_text_encoder: PathSetting = ""
    control_attention: Literal["token_causal", "frame_causal"] = "frame_causal"
    taps: list[str] = field(default_factory=list)


CONFIG = "from a_stage import StageSettings\nargs = StageSettings()\n"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config file with the given lines after its two first ones; the current directory is elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(StageSettings=StageSettings))

    def write(*lines: str) -> Path:
        path = tmp_path / "configs" / "some_config.py"
        path.write_text(CONFIG + "\n".join(lines) + "\n")
        return path

    return write


def refusal(path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_settings(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_pass(config):
    args = load_settings(config())
    assert args.train_batch_size == 1 and args.frame_buckets == [33] and args.checkpoints_total_limit == 3


def test_lists_are_not_shared_between_instances():
    TrainingSettings().frame_buckets.append(1)
    assert TrainingSettings().frame_buckets == [33]


def test_unknown_setting_names_file_line_and_nearest(config):
    path = config("args.seed = 1", "args.train_batchsize = 4")
    assert refusal(path) == f"{path}:4: unknown setting 'train_batchsize' (did you mean train_batch_size?)"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("args.train_batch_size = 2.0", "a whole number"),
        ("args.train_batch_size = True", "a whole number"),
        ("args.learning_rate = '1e-4'", "a number"),
        ("args.learning_rate = True", "a number"),
        ("args.frame_buckets = 33", "a list of whole numbers"),
        ("args.frame_buckets = [33, '65']", "a list of whole numbers"),
        ("args.gradient_checkpointing = 1.5", "a whole number or True or False"),
        ("args.output_dir = None", "a path"),
        ("args.checkpoints_total_limit = 'all'", "a whole number or None"),
        ("args.control_attention = 'causal'", "one of 'token_causal', 'frame_causal'"),
    ],
)
def test_wrong_type_names_what_is_right(config, line, wanted):
    path = config(line)
    message = refusal(path)
    assert message.startswith(f"{path}:3: {line.split('.')[1].split(' ')[0]}: must be ") and wanted in message


def test_whole_numbers_and_tuples_are_taken_where_they_lose_nothing(config):
    args = load_settings(config("args.learning_rate = 1", "args.frame_buckets = (17, 33)"))
    assert args.learning_rate == 1.0 and isinstance(args.learning_rate, float) and args.frame_buckets == [17, 33]


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("args.frame_buckets = [33, 30]", "30 frames is not 4n+1; use 29 or 33"),
        ("args.frame_buckets = [1]", "use 5 or 9"),
        ("args.frame_buckets = []", "at least one"),
        ("args.frame_buckets = [33, 33]", "twice"),
        ("args.height_buckets = [484]", "484 is not a multiple of 16; use 480 or 496"),
        ("args.width_buckets = [8]", "use 16 or 32"),
        ("args.train_batch_size = 0", "more than 0"),
        ("args.learning_rate = float('nan')", "more than 0"),
        ("args.lr_warmup_steps = -1", "0 or more"),
        ("args.gradient_checkpointing = -1", "0 or more"),
        ("args.caption_dropout = 1.5", "between 0 and 1"),
        ("args.adam_beta2 = 1.0", "less than 1"),
        ("args.mixed_precision = 'fp16'", "use 'bf16' or 'no'"),
        ("args.mixed_precision = 'fp32'", "'no', 'bf16'"),
        ("args.lr_scheduler = 'cosin'", "'cosine'"),
        ("args.report_to = 'mlflow'", "'tensorboard', 'wandb', 'none'"),
        ("args.checkpoints_total_limit = 0", "1 or more"),
        ("args.latent_cache_dir = 'cache'", "windows_per_clip"),
    ],
)
def test_impossible_values_name_their_line(config, line, right):
    path = config("args.seed = 7", line)
    name = line.removeprefix("args.").split(" ")[0]
    message = refusal(path)
    assert message.startswith(f"{path}:4: {name}: ") and right in message


def test_overrides_of_every_kind(config):
    path = config("args.train_batch_size = 4", "args.gradient_checkpointing = False")
    words = ["--train_batch_size", "2", "--gradient_checkpointing", "--learning_rate=3e-4"]
    words += ["--frame_buckets", "17,33", "65", "--height_buckets", "[480]", "--checkpoints_total_limit", "None"]
    words += ["--resume_from_checkpoint", "none", "--validation_prompts", "a car, red", "snow"]
    args = load_settings(path, words)
    assert (args.train_batch_size, args.gradient_checkpointing, args.learning_rate) == (2, True, 3e-4)
    assert args.frame_buckets == [17, 33, 65] and args.height_buckets == [480]
    assert args.checkpoints_total_limit is None and args.resume_from_checkpoint == "none"
    assert args.validation_prompts == ["a car, red", "snow"]
    assert load_settings(path, ["--gradient_checkpointing", "false", "--seed", "1", "--seed", "2"]).seed == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "--learning_rat: no such setting (did you mean learning_rate?)"),
        ("--seed one", "--seed: 'one' is not a whole number"),
        ("--seed", "--seed: given no value, wants a whole number"),
        ("--seed 1 2", "--seed: given 2 values"),
        ("--frame_buckets 33 x", "--frame_buckets: 'x' is not a whole number"),
        ("--gradient_checkpointing maybe", "--gradient_checkpointing: 'maybe' is not a whole number or True or False"),
        ("--control_attention causal", "--control_attention: 'causal' is not one of"),
        ("stray", "'stray' follows no --name"),
        ("--frame_buckets 34", "launch line: frame_buckets: 34 frames is not 4n+1; use 33 or 37"),
    ],
)
def test_bad_overrides_name_themselves(config, words, message):
    assert refusal(config(), *words.split()).startswith(message)


def test_paths_count_from_whoever_states_them(config, tmp_path):
    path = config("args.data_root = '../data'", "args.output_dir = '/abs/out'")
    args = load_settings(path, ["--index_file", "index.json", "--resume_from_checkpoint", "run/checkpoint-5"])
    assert args.data_root == str(tmp_path / "data")
    assert args.output_dir == "/abs/out"
    assert args.index_file == str(tmp_path / "elsewhere" / "index.json")
    assert args.resume_from_checkpoint == str(tmp_path / "elsewhere" / "run" / "checkpoint-5")
    assert args.latent_cache_dir == ""  # not set stays not set


def test_hub_ids_stay_unless_such_a_directory_exists(config, tmp_path):
    path = config("args.pretrained_model_name_or_path = 'org/model-2b'", "args.control_text_encoder = 'a/clip'")
    args = load_settings(path)
    assert args.pretrained_model_name_or_path == "org/model-2b" and args.control_text_encoder == "a/clip"
    (tmp_path / "configs" / "org" / "model-2b").mkdir(parents=True)
    assert load_settings(path).pretrained_model_name_or_path == str(tmp_path / "configs/org/model-2b")
    dotted = load_settings(path, ["--pretrained_model_name_or_path", "./org/model-2b"])
    assert dotted.pretrained_model_name_or_path == str(tmp_path / "elsewhere/org/model-2b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("args.seed = = 1", ":3: invalid syntax"),
        ("args.seed = nothing", ":3: NameError: name 'nothing' is not defined"),
        ("import no_such_module_here", ":3: ModuleNotFoundError"),
        ("del args", ": defines no `args`"),
    ],
)
def test_a_broken_config_file_names_its_line(config, line, message):
    path = config(line)
    assert refusal(path).startswith(f"{path}{message}")


def test_a_missing_config_file(tmp_path):
    assert refusal(tmp_path / "none.py") == f"--config: cannot read {tmp_path / 'none.py'}: No such file or directory"


def test_parse_launch_line():
    assert parse_launch_line(["--seed", "1", "--config", "a.py", "--dry_run", "--fps", "8"]) == (
        "a.py", True, ["--seed", "1", "--fps", "8"],
    )  # fmt: skip
    for argv in ([], ["--config"], ["--config", "--dry_run"]):
        with pytest.raises(UserError, match="--config is missing"):
            parse_launch_line(argv)


def test_saved_settings_say_everything(tmp_path):
    args = StageSettings(learning_rate=2e-4, validation_prompts=["schnee ❄"])
    args.save(tmp_path / "new" / "settings.json")
    saved = json.loads((tmp_path / "new" / "settings.json").read_text())
    assert StageSettings(**saved) == args and set(saved) == set(setting_types(StageSettings))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["settings.json"]


def test_check_files_wants_inputs_and_a_writable_output(tmp_path):
    args = TrainingSettings(pretrained_model_name_or_path="base", output_dir=str(tmp_path / "out/deep"))
    with pytest.raises(UserError, match="data_root: is not set"):
        args.check_files()
    args.data_root, args.index_file = str(tmp_path), str(tmp_path / "index.json")
    with pytest.raises(UserError, match="index_file: .*index.json does not exist"):
        args.check_files()
    (tmp_path / "index.json").touch()
    args.check_files()
    assert not (tmp_path / "out").exists()  # looking leaves nothing behind
    args.output_dir = str(tmp_path / "index.json" / "out")  # below a file: not even root may write there
    with pytest.raises(UserError, match="output_dir: .* cannot be written"):
        args.check_files()


def test_every_base_setting_is_explained():
    source = Path(sys.modules[TrainingSettings.__module__].__file__).read_text().splitlines()
    for name in setting_types(TrainingSettings):
        line = next(line for line in source if line.startswith(f"    {name}: "))
        assert len(line.partition("  # ")[2]) > 8, f"{name} has no explanation"


def test_what_training_advises_when_memory_runs_out_are_settings():
    named = set(re.findall(r"\w+_\w+", OUT_OF_MEMORY_HELP))
    assert {"train_batch_size", "gradient_checkpointing"} <= named <= set(setting_types(TrainingSettings))


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_config_imports_nothing_heavy():
    code = (
        "import sys, common.config.loader, common.config.errors, common.data.control_signals\n"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'decord') if m in sys.modules])"
    )
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("raised", "code", "stderr"),
    [
        ("UserError('a\\nb')", 2, "error: a b\n"),
        ("PermissionError(13, 'Permission denied', '/x')", 2, "error: [Errno 13] Permission denied: '/x'\n"),
        ("KeyboardInterrupt()", 130, ""),
    ],
)
def test_run_cli_is_one_line_and_an_exit_code(raised, code, stderr):
    program = "from common.config.errors import *\ndef main():\n    raise {}\nrun_cli(main)"
    result = run(program.format(raised))
    assert (result.returncode, result.stderr) == (code, stderr)


def test_run_cli_helps_when_memory_runs_out_and_keeps_the_traceback_of_bugs():
    program = "from common.config.errors import *\ndef main():\n    raise {}\nrun_cli(main)"
    result = run(program.format("RuntimeError('CUDA out of memory. Tried 9 GiB')"))
    assert (result.returncode, result.stderr) == (2, "error: out of memory (CUDA out of memory. Tried 9 GiB)\n")
    result = run(program.replace("(main)", "(main, 'take less')").format("MemoryError()"))
    assert (result.returncode, result.stderr) == (2, "error: take less ()\n")
    result = run(program.format("KeyError('bug')"))
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert run("from common.config.errors import *\nrun_cli(lambda: None)").returncode == 0
