"""scripts/play.sh: which model it takes, and that it hands everything on."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def play(tmp_path):
    """Runs a copy of the script with an `echo` for Python, in a root of its own; (exit code, stdout, stderr)."""
    root, tools = tmp_path / "checkout", tmp_path / "tools"
    (root / "scripts").mkdir(parents=True)
    tools.mkdir()
    (root / "scripts" / "play.sh").write_text((ROOT / "scripts" / "play.sh").read_text())
    (root / "scripts" / "environment.sh").write_text(f'need_environment() {{ cd "{root}"; }}\n')
    (tools / "python").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (tools / "python").chmod(0o755)

    def run(*words: str, models: tuple[str, ...] = ()) -> tuple[int, str, str]:
        for model in models:
            (root / model).mkdir(parents=True)
            (root / model / "model_index.json").write_text("{}")
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        command = ["bash", str(root / "scripts" / "play.sh"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.strip().replace(str(tmp_path), "@"), done.stderr

    return run


SHIPPED, TRAINED = "data/miniworld/weights/stage4", "outputs/miniworld/stage4"


@pytest.mark.parametrize(("models", "taken"), [((SHIPPED, TRAINED), SHIPPED), ((TRAINED,), TRAINED)])
def test_takes_the_shipped_weights_else_those_of_quickstart(play, models, taken):
    code, out, _ = play("--port", "9000", models=models)
    assert (code, out) == (0, f"@ -m common.serving.server --model_path @/checkout/{taken} --port 9000")


@pytest.mark.parametrize("words", [["--model_path", "a b"], ["--model_path=x", "--token", "t"], ["--help"]])
def test_hands_its_arguments_on_from_where_it_was_called(play, words):
    code, out, _ = play(*words, models=(TRAINED,))
    assert (code, out) == (0, " ".join(["@ -m common.serving.server", *words]))


def test_without_a_model_it_says_how_to_get_one(play):
    code, out, err = play()
    assert code == 2 and not out and err.count("\n") == 1 and "bash scripts/quickstart.sh" in err
