"""scripts/launch.sh for 1, 2 and 8 GPUs and two machines: what a dry run shows, and what accelerate makes of it."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from common.tools import launch, train

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "common" / "training" / "toy_config.py"
DDP, FSDP2 = (str(ROOT / "scripts" / "accelerate" / name) for name in ("ddp.yaml", "fsdp2.yaml"))
EIGHT = "0,1,2,3,4,5,6,7"
TWO_MACHINES = {"GPU_IDS": EIGHT, "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
LAYOUTS = [  # environment, processes, machines
    pytest.param({"GPU_IDS": "3"}, 1, 1, id="1"),
    pytest.param({"GPU_IDS": "0,1"}, 2, 1, id="2"),
    pytest.param({"GPU_IDS": EIGHT}, 8, 1, id="8"),
    pytest.param(TWO_MACHINES, 16, 2, id="2x8"),
]


@pytest.fixture
def run_script(noting_python):
    """scripts/launch.sh with a Python that notes its words and leaves: (exit code, stderr, words of its last start)."""
    python, starts = noting_python

    def run(*words: str, **environment: str) -> tuple[int, str, list[str]]:
        ours = ("CUDA_VISIBLE_DEVICES", "GPU_IDS", "ACCELERATE_CONFIG_FILE", "NUM_PROCESSES", "NNODES", "NODE_RANK")
        ours += ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "launch.sh"), "unused.py", "--config", str(CONFIG), *words],
            env=inherited | {"PYTHON": str(python)} | environment, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stderr, starts()[-1][1] if starts() else []

    return run


@pytest.mark.parametrize("config", ["", FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize(("environment", "processes", "machines"), LAYOUTS)
def test_dry_run_shows_the_layout_and_accelerate_understands_the_line(
    run_script, monkeypatch, capsys, tmp_path, environment, processes, machines, config
):
    environment = environment | ({"ACCELERATE_CONFIG_FILE": config} if config else {})
    words = ("--gradient_accumulation_steps", "3", "--validation_prompts", "it's a road", "ünd so")
    *_, dry_run = run_script(*words, "--dry_run", **environment)
    *_, started = run_script(*words, **environment)

    module, line = dry_run[1], dry_run[2:]
    monkeypatch.setattr("sys.argv", [module, *line])
    for name in ("TOY_DATA", "TOY_OUTPUT"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    {"common.tools.launch": launch.main, "common.tools.train": train.main}[module]()
    shown = json.loads(capsys.readouterr().out)["launch"]
    assert (shown["processes"], shown["machines"]) == (processes, machines)
    assert shown["samples per optimizer step"] == 2 * 3 * processes
    assert shlex.split(shown["command"])[1:] == started
    if processes == 1 and not config:
        assert module == "common.tools.train" and "accelerate config" not in shown
        return
    assert shown["accelerate config"] == (config or DDP)
    assert ("FSDP2" if config else "DDP") in shown["models"]
    check_what_accelerate_would_start(started[2:], processes, machines, is_sharded=bool(config))


def check_what_accelerate_would_start(line: list[str], processes: int, machines: int, is_sharded: bool) -> None:
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.module and arguments.training_script == "common.tools.train"
    assert (arguments.use_fsdp, arguments.multi_gpu) == (is_sharded, not is_sharded)
    assert int(arguments.nproc_per_node) == processes // machines and arguments.mixed_precision == "no"
    if machines > 1:
        assert (arguments.nnodes, arguments.node_rank) == (str(machines), 1)
        assert (arguments.rdzv_endpoint, arguments.rdzv_backend) == ("10.0.0.1:29500", "static")
    if is_sharded:
        with pytest.MonkeyPatch.context() as patch:
            for name in environment.keys() - os.environ.keys():
                patch.setenv(name, environment[name])
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.transformer_cls_names_to_wrap == ["CogVideoXBlock", "ControlBlock"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK is 2; of NNODES 2 machines"),
        ({"NNODES": "two"}, "of NNODES two machines"),
        ({"NNODES": "2", "NUM_PROCESSES": "3"}, "NUM_PROCESSES is 3; over all machines it must be a multiple of"),
        ({"NUM_PROCESSES": "0"}, "NUM_PROCESSES is 0"),
        ({"NNODES": "2"}, "need MASTER_ADDR"),
        ({"GPU_IDS": "0,1", "ACCELERATE_CONFIG_FILE": "none.yaml"}, "ACCELERATE_CONFIG_FILE: none.yaml does not exist"),
        ({"GPU_IDS": "0", "NUM_PROCESSES": "2"}, "NUM_PROCESSES is 2 on 1 machines, and this one has 1 GPUs"),
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused_in_one_line_before_anything_starts(run_script, environment, message):
    code, said, started = run_script(**({"GPU_IDS": ""} | environment))
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not started
