"""The ablation's bookkeeping. Training and evaluation have tests of their own; here they are written down, not run."""

import json
from pathlib import Path
from threading import Barrier

import pytest

from common.config.errors import UserError
from common.config.loader import load_settings
from data.miniworld.ablate import ARMS, DEFAULT, Ablation, parse_arguments, run_program, table_of

WINDOWS = {2: [], 3: ["--window_frames", "17", "33"], 4: ["--window_frames", "17", "33"]}


@pytest.mark.parametrize(("stage", "arm"), [(stage, arm) for stage, arms in ARMS.items() for arm in arms])
def test_every_arm_is_a_change_that_its_stage_knows(stage, arm):
    config, words = f"stage{stage}/training/miniworld_config.py", WINDOWS[stage]
    default = load_settings(config, words).to_dict()
    change = ARMS[stage][arm]
    changed = load_settings(config, [*words, *change.train.format(clip_cache="cache").split()]).to_dict()
    assert (changed != default) == bool(change.train)
    assert bool(change.train or change.evaluate) == (arm != DEFAULT)


class Programs:
    """Notes what is run, and leaves behind what it would leave: F1 .5 for the default, .7 for all others."""

    def __init__(self):
        self.calls = []

    def __call__(self, words, log):
        self.calls.append(list(words))
        out = words[words.index("--output_dir") + 1]
        seed = int(words[words.index("--seed" if "--seed" in words else "--seeds") + 1])
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        if words[0] == "common.tools.train":
            (folder / "model_index.json").write_text("{}")
            return
        f1 = (0.5 if "/default/" in words[words.index("--model_path") + 1] else 0.7) + 0.01 * seed
        measures = {
            "control": {"streams": {"macro_f1": [f1, 0, 1]}},
            "frechet": {"streams": {"distance": [3.0, 2, 4]}},
            "latency": {"w2": {"median": [8.0, 8, 8], "live_f1": [f1 - 0.1, 0, 1]}},
            "drift": {"straight": {"last_ratio": [2.5, 2, 3]}},
        }
        rows = [{"kind": "true", "measures": {}}, {"kind": "model", "measures": measures}]
        (folder / "report.json").write_text(json.dumps({"rows": rows}))
        for name, text in (("true.control", out), ("vae-1.control", out), ("model.control", out)):
            part = folder / "parts" / f"{name}.streams.seed{seed}.json"
            if not part.exists():
                part.parent.mkdir(exist_ok=True)
                part.write_text(text)


def ablation(tmp_path, *words):
    args = parse_arguments(
        ["--stage", "3", "--pretrained_model_name_or_path", "stage2", "--output_dir", str(tmp_path), *words]
    )
    return Ablation(args, Programs())


def test_runs_each_arm_once_and_sampling_alone_on_the_defaults_weights(tmp_path):
    words = ("--seeds", "0", "1", "--arms", DEFAULT, "muon", "4 steps", "--", "--max_train_steps", "7")
    first = ablation(tmp_path, *words)
    table = first.all()
    trained = [call for call in first.run.calls if call[0] == "common.tools.train"]
    assert len(trained) == 4 and all("--max_train_steps" in call for call in trained)
    assert [call[-2:] for call in trained if "muon" in call] == [["--optimizer", "muon"]] * 2
    measured = [call for call in first.run.calls if call[0] == "common.tools.evaluate"]
    four = [call for call in measured if "--num_inference_steps" in call]
    assert len(measured) == 6 and len(four) == 2 and all("/default/" in call[2] for call in four)

    again = ablation(tmp_path, *words)
    assert again.all() == table and again.run.calls == first.run.calls  # the programs know what is done already
    assert (tmp_path / "ablation.md").read_text() == table


def test_a_changed_command_reaches_the_programs_which_refuse_it(tmp_path):
    kept = ("--seeds", "0", "--arms", "4 steps")
    ablation(tmp_path, *kept, "--", "--max_train_steps", "7").all()
    changed = ablation(tmp_path, *kept, "--num_videos", "8", "--drift_minutes", "1", "--", "--max_train_steps", "8")
    changed.all()
    train, evaluate = (" ".join(call) for call in changed.run.calls)
    assert train.startswith("common.tools.train ") and "--max_train_steps 8" in train
    assert evaluate.startswith("common.tools.evaluate ") and "--num_videos 8" in evaluate and "--minutes 1" in evaluate


def test_true_video_is_measured_once_a_seed(tmp_path):
    ablation(tmp_path, "--seeds", "0", "1", "--arms", DEFAULT, "muon").all()
    for seed in (0, 1):
        muon, default = (tmp_path / arm / str(seed) / "report" for arm in ("muon", DEFAULT))
        by = {part.name.split(".")[0]: part.read_text() for part in (muon / "parts").iterdir()}
        assert by == {"true": str(default), "vae-1": str(default), "model": str(muon)}


def test_jobs_run_side_by_side_and_make_nothing_twice(tmp_path):
    words = ("--seeds", "0", "--arms", DEFAULT, "4 steps", "muon")
    side_by_side = ablation(tmp_path / "jobs", *words, "--jobs", "3")
    both, programs = Barrier(2, timeout=60), side_by_side.run

    def run(call, log):
        assert log.name == "log.txt" and log.parent.parent.parent == tmp_path / "jobs"
        if call[0] == "common.tools.train":
            both.wait()  # "default" and "muon": sampling alone waits for the default's weights
        programs(call, log)

    side_by_side.run = run
    assert side_by_side.all() == ablation(tmp_path / "one", *words).all()
    assert sum(call[0] == "common.tools.train" for call in programs.calls) == 2
    drawn = {part.read_text() for part in (tmp_path / "jobs").glob("*/0/report/parts/true.*")}
    assert len(drawn) == 1


def test_what_fails_says_where_and_starts_nothing_more(tmp_path):
    failing = ablation(tmp_path, "--seeds", "0", "1", "2", "--arms", DEFAULT, "muon", "--jobs", "2")
    failing.run = lambda call, log: run_program(["no.such.program"], log)
    with pytest.raises(UserError, match=r"no.such.program ended with 1, see .*log.txt"):
        failing.all()
    assert failing.is_stopped.is_set()
    with pytest.raises(UserError, match="was not started"):  # as of a job that waited for its turn
        failing.measure(DEFAULT, 2)
    logs = list(tmp_path.glob("*/*/log.txt"))
    assert len(logs) < 6 and all("No module named" in log.read_text() for log in logs)


def test_drift_is_measured_when_minutes_are_given(tmp_path):
    run = ablation(tmp_path, "--seeds", "0", "--arms", DEFAULT, "--drift_minutes", "5")
    assert "| drift straight |" in run.all()
    words = " ".join(run.run.calls[-1])
    assert "--measures control frechet latency drift --minutes 5 " in words


def test_table_marks_what_the_seeds_tell_apart():
    def runs(*values):
        return {seed: {"control F1": value} for seed, value in enumerate(values)}

    table = table_of({DEFAULT: runs(0.50, 0.52, 0.51), "better": runs(0.6, 0.55, 0.7), "alike": runs(0.4, 0.505, 0.6)})
    default, better, alike = table.splitlines()[2:]
    assert default == "| default | 3 | 0.510 (0.500…0.520) |"
    assert better == "| better | 3 | **0.617 (0.550…0.700)** |" and "**" not in alike


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--arms", "nonsense"), "stage 3 has 'default'"),
        (("--drift_minutes", "0.1"), "0.17 or more"),
        (("--stage", "2", "--drift_minutes", "5"), "which stream"),
        (("--arms", "W=2 windows from first frames"), "--clip_cache"),
    ],
)
def test_refuses_arms_that_it_cannot_run(tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        ablation(tmp_path, *words)
