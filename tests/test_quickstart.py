"""scripts/quickstart.sh with a stand-in for Python: what it calls exists and takes these arguments, what is there is
kept, and Ctrl-C ends it."""

import argparse
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config.loader import load_settings, parse_launch_line

ROOT = Path(__file__).parents[1]

# Notes how it was called and writes what the real program would write last.
STAND_IN = f"""#!{sys.executable} -S
import os, pathlib, shlex, signal, sys, time
words, root = sys.argv[1:], pathlib.Path(os.environ["STAND_IN_ROOT"])
if words[0] == "-c":
    print(root)
    sys.exit()
if words[:2] == ["-m", "pip"]:
    sys.exit()
with (root / "calls").open("a") as log:
    log.write(shlex.join([os.path.relpath(os.getcwd(), root), *words]) + "\\n")
program, stage = words[1] if words[0] == "-m" else words[0], pathlib.Path.cwd().name
if program == "common.tools.train" and os.environ.get("HOLD_AT") == stage:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as training does, when it has saved
    (root / "holding").touch()
    time.sleep(60)
made = {{
    "common.tools.precompute": ["latents/fingerprint.json"],
    "common.tools.train": [f"{{stage}}/model_index.json", f"{{stage}}/pytorch_lora_weights.safetensors"],
    "stage1/fuse_lora_weights.py": ["stage1_fused/model_index.json"],
}}.get(program, [])
for name in made:
    path = root / "outputs/miniworld" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or program.startswith("stage1/"):
        path.write_text("made")
if program.endswith("inference.py"):
    video = root / words[words.index("--output") + 1]
    video.parent.mkdir(exist_ok=True)
    for path in (video, video.with_suffix(".json")):
        path.write_text("made")
"""


class Quickstart:
    """A copy of the scripts in an empty folder, with the stand-in as its Python."""

    def __init__(self, root: Path):
        self.root, self.world = root, root / "outputs" / "miniworld"
        for path in [*(ROOT / "scripts").glob("*.sh"), *ROOT.glob("stage?/*.sh"), ROOT / "pyproject.toml"]:
            (root / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, root / path.relative_to(ROOT))
        shutil.copy(ROOT / "requirements.txt", root)
        (root / "bin").mkdir()
        (root / "bin" / "python").write_text(STAND_IN)
        (root / "bin" / "python").chmod(0o755)
        self.environment = {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(root), "STAND_IN_ROOT": str(root),
            "CUDA_VISIBLE_DEVICES": "", "HOME": str(root),
        }  # fmt: skip

    def start(self, **more: str) -> subprocess.Popen:
        (self.root / "calls").write_text("")
        return subprocess.Popen(
            ["bash", "scripts/quickstart.sh"], cwd=self.root, env=self.environment | more, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run where it is ignored
        )  # fmt: skip

    def run(self) -> str:
        process = self.start()
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
        return said

    def calls(self) -> list[list[str]]:
        """[folder, argument, …] of every call of Python in the last run."""
        return [shlex.split(line) for line in (self.root / "calls").read_text().splitlines()]


@pytest.fixture
def quickstart(tmp_path) -> Quickstart:
    return Quickstart(tmp_path)


class Accepted(Exception):
    """The program has parsed its arguments."""


def check_call(folder: str, words: list[str], monkeypatch) -> None:
    """The program is there and accepts the arguments; for training and precompute, the config and the overrides."""
    name = words[1] if words[0] == "-m" else words[0]
    if name in ("common.tools.train", "common.tools.precompute"):
        config, _, overrides = parse_launch_line(words[2:])
        load_settings(ROOT / folder / config, overrides)
        return
    monkeypatch.setattr(sys, "argv", [name, *words[2 if words[0] == "-m" else 1 :]])
    with pytest.raises(Accepted):
        if words[0] == "-m":
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / folder / name), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_program_exists_and_takes_its_arguments(quickstart, monkeypatch):
    said = quickstart.run()
    tips = said.split("What to try next:")[1].replace("\\\n", " ").splitlines()
    calls = quickstart.calls() + [[".", *shlex.split(tip)[1:]] for tip in tips if tip.strip().startswith("python ")]
    programs = [next(word for word in call[1:] if word != "-m") for call in calls]
    assert programs.count("common.tools.train") == 4 and len(calls) == 14 and programs[-1] == "stage4/inference.py"

    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self, *arguments):
        parse(self, *arguments)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    for folder, *words in calls:
        check_call(folder, words, monkeypatch)
    for folder, script, config in re.findall(r"cd (\w+) && bash (\S+) --config (\S+)", said):
        assert (ROOT / folder / script).is_file() and (ROOT / folder / config).is_file()


def test_a_second_run_makes_only_drives_that_are_missing_or_older_than_their_model(quickstart):
    def drives() -> list[str]:
        return [call[1] for call in quickstart.calls() if call[1].endswith(("inference.py", "fuse_lora_weights.py"))]

    quickstart.run()
    assert drives() == ["stage1/fuse_lora_weights.py", *(f"stage{n}/inference.py" for n in (1, 2, 3, 4))]
    assert "drives/stage1.mp4 is there already" in quickstart.run()
    assert drives() == []
    (quickstart.world / "drives" / "stage2.json").unlink()  # as if stopped in the middle of the video
    (quickstart.world / "stage3" / "model_index.json").touch()
    quickstart.run()
    assert drives() == ["stage2/inference.py", "stage3/inference.py"]
    (quickstart.world / "stage1" / "pytorch_lora_weights.safetensors").touch()
    quickstart.run()
    assert drives() == ["stage1/fuse_lora_weights.py", "stage1/inference.py"]


def test_ctrl_c_ends_it_though_training_leaves_with_0(quickstart):
    process = quickstart.start(HOLD_AT="stage2")
    deadline = time.monotonic() + 60
    while not (quickstart.root / "holding").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "interrupted; the same command goes on from here" in said
    assert quickstart.calls()[-1][:3] == ["stage2", "-m", "common.tools.train"]
