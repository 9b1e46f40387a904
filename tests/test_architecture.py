"""Rules about the code itself: who imports whom, how long files and functions are, what nobody reads."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("stage1", "stage2", "stage3", "stage4")
LEVELS = {"config": 0, "cogvideox": 1, "data": 1, "training": 2, "evaluation": 2, "serving": 3, "tools": 3}

# Lists that may only get shorter: path → lines allowed, path::function → lines allowed.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {
    # diffusers' own constructor arguments, each of which has to be named for `register_to_config`
    "common/cogvideox/transformer.py::__init__": 83,
}


def python_files(*folders: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / f for f in listed if (not folders or f.split("/")[0] in folders) and (ROOT / f).exists()]


def imported_modules(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_imports_go_one_way():
    wrong = []
    for path in python_files("common", "data", *STAGES):
        here = path.relative_to(ROOT)
        for module in imported_modules(ast.parse(path.read_text())):
            top, *rest = module.split(".")
            if here.parts[0] in ("common", "data") and top in STAGES:
                wrong.append(f"{here} imports {module}: common and data know no stage")
            if here.parts[0] in STAGES and top in STAGES and top != here.parts[0]:
                wrong.append(f"{here} imports {module}: stages meet through directories on disk")
            if here.parts[0] == "common" and len(here.parts) > 2 and top == "common" and rest:
                mine, theirs = here.parts[1], rest[0]
                level, other = LEVELS[mine], LEVELS[theirs]
                # Tools are programs over one another's functions; all else imports its own folder or a lower level.
                if other > level or (other == level and mine != theirs):
                    wrong.append(f"{here} imports {module}: level {level} imports level {other}")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_are_short():
    wrong, used = [], set()
    for path in python_files():
        here, text = str(path.relative_to(ROOT)), path.read_text()
        lines = text.count("\n")
        if lines > LONG_FILES.get(here, 300):
            wrong.append(f"{here}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length, key = node.end_lineno - node.lineno + 1, f"{here}::{node.name}"
                if length > 80:
                    used.add(key)
                if length > LONG_FUNCTIONS.get(key, 80):
                    wrong.append(f"{key}: {length} lines")
        if lines > 300:
            used.add(here)
    assert not wrong, "\n".join(wrong)
    assert used == {*LONG_FILES, *LONG_FUNCTIONS}, "an exemption is no longer needed: take it from the list"


def test_common_does_not_print():
    printing = []
    for path in python_files("common"):
        here = path.relative_to(ROOT)
        if here.parts[1] == "tools":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                printing.append(f"{here}:{node.lineno}")
    assert not printing


def test_nothing_is_vendored_or_left_over():
    """No unfinished ends, and no path of somebody's machine."""
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|/home/\w|/root/|/work/|/Users/")
    found = []
    for path in python_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if marks.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def settings_classes() -> list[type]:
    from stage1.training.lora import LoraSettings
    from stage2.training.control import ControlSettings
    from stage3.training.swin_dpm import SwinDPMSettings
    from stage4.training.scm import SCMSettings
    from stage4.training.self_rollout_settings import SelfRolloutSettings

    return [LoraSettings, ControlSettings, SwinDPMSettings, SCMSettings, SelfRolloutSettings]


@pytest.mark.parametrize("settings_class", settings_classes(), ids=lambda c: c.__name__)
def test_every_setting_is_read_by_something(settings_class):
    """A setting counts as read where it is loaded from `settings` or `….settings` in code that a training run executes,
    outside of the checks of its own value."""
    read = set()
    checks = re.compile(r"validate|check_|_check")
    own_stage = settings_class.__module__.split(".")[0]
    for path in python_files("common", own_stage):
        if path.name.endswith("_config.py"):
            continue
        tree = ast.parse(path.read_text())
        skipped = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and checks.match(node.name)
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in skipped:
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))  # x in x.name and in y.x.name
                if owner == "settings":
                    read.add(node.attr)
    unread = {field.name for field in dataclasses.fields(settings_class)} - read
    assert not unread
