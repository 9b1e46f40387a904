"""The four stages in two processes, under DDP and FSDP2 in turn, against one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config.loader import load_settings
from common.training.trainer import Trainer
from tests.stages.conftest import ROOT, STAGE_ARGUMENTS, TINY, read_metrics

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3, 4)
LAYOUTS = {"ddp": 2, "fsdp2": 4, "ddp again": 6}  # each goes on from the checkpoint of the one before: its last step
BF16_STAGES = (1, 2, 4)  # those that have frozen weights, of another type than the trained ones
MOST = 1000  # steps from one validation or checkpoint to the next: there is one at the end
LORA = ("--rank", "8", "--max_train_steps", "2", "--validation_steps", "0")  # of stages 2 and 4
STEP = (*LORA, "--max_train_steps", "1")
ROLLOUT = ("--validation_steps", "0", "--rollouts_per_stream", "2", "--ema_decay", "0.9")  # stage 4's second part
PROMPT = "A red car drives along a sandy desert road."


class Runs:
    """All stages as two processes, started once, have trained them."""

    def __init__(self, root: Path, world: Path, bases: dict[int | str, Path | str]):
        self.root, self.world, self.bases = root, world, bases
        self.plan, self.names = [], []
        for stage in STAGES:
            previous = "none"
            for layout, last_step in LAYOUTS.items():
                resume = ["--resume_from_checkpoint", previous, "--max_train_steps", str(last_step)]
                # One sampled video a stage, from sharded models.
                validation = ["--validation_steps", str(MOST if layout == "fsdp2" else 0)]
                self._add(stage, layout, *resume, *validation)
                previous = str(self.output_dir(stage, layout) / f"checkpoint-{last_step}")
        for stage in BF16_STAGES:
            for layout in ("ddp", "fsdp2"):
                more = ["--max_train_steps", "2", "--validation_steps", "0", "--gradient_checkpointing", "True"]
                self._add(stage, f"{layout} bf16", *more)
        for layout in ("ddp", "fsdp2"):
            for stage in (2, 4):
                self._add(stage, f"{layout} lora", *LORA)
        for layout, previous in {"ddp": "none", "fsdp2": str(self.output_dir(3, "ddp 8bit") / "checkpoint-2")}.items():
            more = ["--max_train_steps", str(LAYOUTS[layout]), "--validation_steps", "0", "--optimizer", "adamw_8bit"]
            self._add(3, f"{layout} 8bit", *more, "--resume_from_checkpoint", previous)

        previous = "none"
        for layout, last_step in LAYOUTS.items():
            resume = ["--resume_from_checkpoint", previous, "--max_train_steps", str(last_step)]
            self._add(4, f"{layout} rollout", *resume, *ROLLOUT)
            previous = str(self.output_dir(4, f"{layout} rollout") / f"checkpoint-{last_step}")
            if layout in ("ddp", "fsdp2"):
                self._add(4, f"{layout} rollout bf16", *ROLLOUT, "--max_train_steps", "2")
        more = ["--max_train_steps", "2", "--validation_steps", "0"]
        self._add(3, "fsdp2 compiled", *more, "--compile", "True", "--gradient_checkpointing", "2")

    def output_dir(self, stage: int, name: str) -> Path:
        return self.root / f"stage{stage} {name}"

    def config(self, stage: int, name: str = "") -> str:
        kind = "miniworld_self_rollout_config.py" if "rollout" in name else "miniworld_config.py"
        return str(ROOT / f"stage{stage}" / "training" / kind)

    def words(self, stage: int, name: str, *more: str) -> list[str]:
        paths = {
            "pretrained_model_name_or_path": self.bases[stage], "data_root": self.world,
            "index_file": self.world / "index.json", "output_dir": self.output_dir(stage, name),
        }  # fmt: skip
        words = [word for path in paths.items() for word in (f"--{path[0]}", str(path[1]))]
        words += [*TINY.split(), *STAGE_ARGUMENTS[stage].split(), "--validation_index_file="]
        words += ["--control_end_layer", "3"] if stage == 2 else []
        words += ["--frame_buckets", "17", *(["--validation_control", "D*17"] if stage > 1 else [])]
        words += ["--lr_scheduler", "constant_with_warmup", "--num_validation_clips", "1", "--max_grad_norm", "0.1"]
        words += ["--checkpointing_steps", str(MOST)]
        words += ["--student_model_name_or_path", str(self.bases["student"])] if "rollout" in name else []
        steps = [] if stage == 4 else ["--validation_num_inference_steps", "4" if stage == 3 else "2"]
        return [*words, "--validation_prompts", PROMPT, *steps, *more]

    def _add(self, stage: int, name: str, *words: str) -> None:
        layout, precision = name.split()[0], "bf16" if "bf16" in name else "no"
        words = self.words(stage, name, "--train_batch_size", "1", *words)
        self.names.append((stage, name))
        config = self.config(stage, name)
        self.plan.append({"config": config, "words": words, "layout": layout, "mixed_precision": precision})

    def launch(self) -> None:
        path = self.root / "plan.json"
        path.write_text(json.dumps(self.plan))
        accelerate = ["--config_file", str(ROOT / "scripts" / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
        accelerate += ["--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0"]
        program = str(ROOT / "tests" / "stages" / "layout_runs.py")
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        run = subprocess.run(
            [sys.executable, "-m", "common.tools.launch", *accelerate, program, str(path)],
            env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        by_rank = [json.loads(path.with_name(f"plan.json.{rank}").read_text()) for rank in (0, 1)]
        self.shares = {name: [shares[i] for shares in by_rank] for i, name in enumerate(self.names)}

    def in_one_process(
        self,
        stage: int,
        name: str = "one process",
        more: tuple[str, ...] = ("--max_train_steps", "6", "--validation_steps", "4"),
    ) -> Path:
        settings = load_settings(self.config(stage, name), self.words(stage, name, "--train_batch_size", "2", *more))
        Trainer(settings, settings.build_objective()).train()  # once: what is finished is left as it is
        return Path(settings.output_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base, tiny_models, tiny_world) -> Runs:
    bases = {1: tiny_base, 2: tiny_base, 3: tiny_models / "stage2", 4: tiny_models / "stage3"}
    bases["student"] = tiny_models / "stage4"
    runs = Runs(tmp_path_factory.mktemp("runs"), tiny_world, bases)
    runs.launch()
    return runs


def logged(output_dir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(output_dir) if name in line}


def difference(one: Path, other: Path) -> float:
    """Norm of the difference of two files' tensors, in that of the first; AdamW's numbers of steps left out."""
    a, b = (load_file(path) for path in (one, other))
    assert a.keys() == b.keys()
    names = sorted(name for name in a if a[name].dim())
    a, b = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (a, b))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("stage", STAGES)
def test_ddp_and_fsdp2_go_on_from_each_other_and_train_like_one_process_with_twice_the_batch(runs, stage):
    one = runs.in_one_process(stage)
    for name in ("loss", "grad_norm"):
        parts = [logged(runs.output_dir(stage, layout), name) for layout in LAYOUTS]
        assert [list(part) for part in parts] == [[1, 2], [3, 4], [5, 6]]
        assert {k: v for part in parts for k, v in part.items()} == pytest.approx(logged(one, name), rel=1e-5)
    for name in ("weights", "optimizer", *(["target"] if stage == 4 else [])):
        last = [d / "checkpoint-6" / f"{name}.safetensors" for d in (one, runs.output_dir(stage, "ddp again"))]
        assert difference(*last) < 1e-5, name


def test_streams_go_on_in_whatever_processes_there_are(runs):
    """Self-rollout's streams are a state like weights: under DDP and FSDP2 in turn as in one process."""
    one = runs.in_one_process(4, "one process rollout", ("--max_train_steps", "6", *ROLLOUT))
    for name in ("loss", "critic_loss", "grad_norm"):
        parts = [logged(runs.output_dir(4, f"{layout} rollout"), name) for layout in LAYOUTS]
        assert {k: v for part in parts for k, v in part.items()} == pytest.approx(logged(one, name), rel=1e-4)
    for name in ("weights", "optimizer", "target", "streams"):
        last = [d / "checkpoint-6" / f"{name}.safetensors" for d in (one, runs.output_dir(4, "ddp again rollout"))]
        assert difference(*last) < 1e-4, name
    sharded = runs.output_dir(4, "fsdp2 rollout") / "transformer"
    part = (
        runs.in_one_process(4, "one process rollout, four steps", ("--max_train_steps", "4", *ROLLOUT)) / "transformer"
    )
    assert difference(*(next(path.glob("*.safetensors")) for path in (part, sharded))) < 1e-4  # gathered whole
    ddp, sharded = (logged(runs.output_dir(4, f"{layout} rollout bf16"), "loss") for layout in ("ddp", "fsdp2"))
    assert sharded == pytest.approx(ddp, rel=0.01) and len(ddp) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_models_are_validated_and_exported_like_whole_ones(runs, stage):
    one, sharded = runs.in_one_process(stage), runs.output_dir(stage, "fsdp2")
    held_out = logged(sharded, "validation/loss")
    assert list(held_out) == [4] and held_out[4] == pytest.approx(logged(one, "validation/loss")[4], rel=1e-5)
    videos = [np.stack(imageio.v3.imread(d / "validation" / "step-4-0.mp4")).astype(float) for d in (one, sharded)]
    assert videos[0].std() > 1 and np.abs(videos[0] - videos[1]).mean() < 0.5  # of 255

    weights = load_file(sharded / "checkpoint-4" / f"{'target' if stage == 4 else 'weights'}.safetensors")
    file = "pytorch_lora_weights" if stage == 1 else "transformer/diffusion_pytorch_model"
    exported = load_file(sharded / f"{file}.safetensors")
    prefix = "transformer." if stage == 1 else ""
    for name, value in weights.items():
        assert torch.equal(exported[prefix + name.replace(".default", "")], value), name


@pytest.mark.parametrize("stage", BF16_STAGES)
def test_frozen_bf16_beside_trained_float32_is_sharded_and_computes_what_ddp_computes(runs, stage):
    ddp, sharded = (runs.output_dir(stage, f"{layout} bf16") for layout in ("ddp", "fsdp2"))
    for name in ("loss", "grad_norm"):
        assert logged(sharded, name) == pytest.approx(logged(ddp, name), rel=2e-3)
    for name in ("weights", *(["target"] if stage == 4 else [])):
        files = [d / "checkpoint-2" / f"{name}.safetensors" for d in (ddp, sharded)]
        assert {value.dtype for value in load_file(files[1]).values()} == {torch.float32}
        assert difference(*files) < 1e-3
    for share in runs.shares[stage, "fsdp2 bf16"]:
        assert share == pytest.approx(dict.fromkeys(share, 0.5), abs=0.02)


def test_student_target_and_teacher_are_whole_under_ddp_and_halved_under_fsdp2(runs):
    whole, halved = (runs.shares[4, name] for name in ("ddp bf16", "fsdp2 bf16"))
    assert whole == [{"module": 1, "target": 1, "teacher": 1}] * 2
    assert all(set(share) == {"module", "target", "teacher"} for share in halved)
    # The student's share is that of a run without validation, after which what lies outside of its blocks is gathered.
    for share in runs.shares[4, "fsdp2"]:
        assert share["target"] == share["teacher"] == pytest.approx(0.5, abs=0.02)


def test_a_lora_over_one_base_is_trained_alike_and_leaves_what_streams(runs, run_program, tmp_path):
    """Its target and teacher, which are not called through the wrapper of the processes, are the student's module."""
    one = runs.in_one_process(4, "one process lora", LORA)
    for layout in ("ddp lora", "fsdp2 lora"):
        for name in ("weights", "target"):
            files = [d / "checkpoint-2" / f"{name}.safetensors" for d in (one, runs.output_dir(4, layout))]
            expected, found = (load_file(file) for file in files)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                if ".lora_B." in key:  # from zero: this is what was learnt
                    assert (found[key] - value).norm() <= 1e-3 * value.norm(), (layout, key)
        video = tmp_path / f"{layout.split()[0]}.mp4"
        size = ["--height", "32", "--width", "64", "--control", "D*17", "--prompt", PROMPT, "--output", str(video)]
        run_program("stage4/inference.py", "--model_path", runs.output_dir(4, layout), *size)
        assert video.stat().st_size > 0


def test_a_lora_beside_the_adapter_is_exported_alike(runs):
    file = "transformer/diffusion_pytorch_model.safetensors"
    one = runs.in_one_process(2, "one process lora", LORA)
    for layout in ("ddp lora", "fsdp2 lora"):
        assert difference(one / file, runs.output_dir(2, layout) / file) < 1e-6, layout
    before = runs.in_one_process(2, "one process lora, one step", STEP)
    assert difference(one / file, before / file) > 1e-4  # what a step is worth


def test_sharded_blocks_are_compiled_and_compute_the_same(runs):
    for name in ("loss", "grad_norm"):
        plain, compiled = (logged(runs.output_dir(3, layout), name) for layout in ("ddp", "fsdp2 compiled"))
        assert compiled == pytest.approx(plain, rel=1e-5)


def test_float8_moments_go_from_ddp_to_fsdp2(runs):
    """Shards round by other draws than wholes: what is learnt is alike, not equal."""
    for layout in ("ddp", "fsdp2"):
        exact, found = (logged(runs.output_dir(3, name), "loss") for name in (layout, f"{layout} 8bit"))
        assert found == pytest.approx(exact, rel=1e-2)
        state = load_file(
            runs.output_dir(3, f"{layout} 8bit") / f"checkpoint-{LAYOUTS[layout]}" / "optimizer.safetensors"
        )
        assert {value.dtype for value in state.values()} == {torch.float32, torch.float8_e4m3fn, torch.float8_e5m2}
        assert all(value.float().isfinite().all() for value in state.values())
