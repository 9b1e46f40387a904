"""Every shipped config parses, resolves its paths from its own folder, and dry-runs; wrong lines are named."""

import ast
import json
from pathlib import Path

import pytest

from common.config.errors import UserError
from common.config.loader import load_settings
from common.config.settings import setting_types

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("stage?/training/*_config.py"))
REAL = [c for c in CONFIGS if not c.name.startswith("miniworld_")]


def test_there_is_a_real_and_a_mini_config_for_every_stage():
    assert [str(c.relative_to(ROOT)) for c in CONFIGS] == [
        "stage1/training/lora_config.py", "stage1/training/miniworld_config.py",
        "stage2/training/miniworld_config.py", "stage2/training/sft_config.py",
        "stage3/training/miniworld_config.py", "stage3/training/sft_config.py",
        "stage4/training/miniworld_config.py", "stage4/training/miniworld_self_rollout_config.py",
        "stage4/training/scm_config.py", "stage4/training/self_rollout_config.py",
    ]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.parts[-3]}-{c.stem}")
def test_config_parses_and_states_type_and_meaning_of_each_setting(config):
    settings = load_settings(config, [])
    for name in ("output_dir", "data_root", "index_file"):
        assert Path(getattr(settings, name)).is_absolute() and ".." not in getattr(settings, name)
    types = setting_types(type(settings))
    for node in ast.parse(config.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            line = config.read_text().splitlines()[node.lineno - 1]
            assert node.targets[0].attr in types
            assert "  # " in line and ": " in line.split("  # ")[1], f"{config.name}:{node.lineno}: {line}"
    assert "Command:" in config.read_text().split('"""')[1]


@pytest.mark.parametrize("config", REAL, ids=lambda c: f"{c.parts[-3]}-{c.stem}")
def test_real_configs_dry_run_without_weights_or_data(config, run_program):
    """On a machine that has neither CogVideoX-2B nor the videos: the sizes are those of the 2B."""
    model = json.loads(run_program("common/tools/train.py", "--config", config, "--dry_run"))["model"]
    with_control = config.parts[-3] != "stage1"
    if "rollout" in config.name:  # student and critic
        model["parameters"], model["trained parameters"] = model["parameters"] / 2, model["trained parameters"] / 2
    assert model["parameters"] - (0 if with_control else model["trained parameters"]) == pytest.approx(
        2.0095e9 if with_control else 2.0095e9 - 315.8e6, rel=1e-3
    )
    if config.parts[-3] == "stage2":
        assert model["trained parameters"] == pytest.approx(315.8e6, rel=1e-3)
    if config.parts[-3] in ("stage3", "stage4"):
        assert model["trained parameters"] == model["parameters"]
    longest = max(load_settings(config, []).frame_buckets)
    assert model["video tokens per window"][f"{longest}x480x720"] == ((longest - 1) // 4 + 1) * 1350


def test_windows_are_what_is_cut_from_clips_of_any_length():
    words = ["--frame_buckets", "89", "--window_frames", "17", "33"]
    settings = load_settings(ROOT / "stage3" / "training" / "sft_config.py", words)
    model = settings.build_objective().describe()
    assert model["latent frames per window"] == [5, 9]
    assert model["video tokens per window"] == {"17x480x720": 5 * 1350, "33x480x720": 9 * 1350}


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("stage1", ["--learing_rate", "1e-4"], r"learing_rate.*learning_rate"),
        ("stage1", ["--rank", "many"], r"rank"),
        ("stage1", ["--frame_buckets", "32"], r"32.*4n\+1.*29 or 33"),
        ("stage1", ["--height_buckets", "100"], r"100 is not a multiple of 16"),
        ("stage2", ["--control_start_layer", "7"], r"control_start_layer"),
        ("stage2", ["--control_tokens_per_frame", "0"], r"control_tokens_per_frame.*1 or more"),
        ("stage2", ["--control_attention", "none"], r"frame_causal"),
        ("stage3", ["--frame_buckets", "29"], r"29 frames do not make.*4 equal groups.*17 or 33"),
        ("stage3", ["--window_frames", "65"], r"window_frames"),
        ("stage3", ["--frame_buckets", "89", "--window_frames", "29"], r"window_frames: 29 frames do not make"),
        ("stage4", ["--validation_num_inference_steps", "8"], r"validation_num_inference_steps.*leave it at 20"),
        ("stage4", ["--num_solver_steps", "50"], r"50 is not a multiple of the 4 phases.*48 or 52"),
        ("stage4", ["--guidance_range", "2", "6"], r"cond_proj_dim"),
        ("stage4", ["--guidance_range", "0", "2", "--cond_proj_dim", "8"], r"guidance_range: .* 1 ≤ low ≤ high"),
        ("stage4", ["--teacher_guidance_scale", "0"], r"teacher_guidance_scale: must be 1, for none, or more"),
        ("stage4", ["--teacher_control_guidance_scale", "nan"], r"teacher_control_guidance_scale: must be 1"),
        ("stage4", ["--ema_decay", "1"], r"ema_decay"),
        ("stage1", ["--rank", "0"], r"rank: must be 1 or more"),
        ("stage2", ["--rank", "-1"], r"rank: must be 0 .* or more, got -1"),
        ("stage4", ["--rank", "-1"], r"rank: must be 0 .* or more, got -1"),
        ("stage4", ["--rank", "4", "--lora_alpha", "0"], r"lora_alpha: must be more than 0"),
        ("stage4", ["--rank", "4", "--guidance_range", "2", "6", "--cond_proj_dim", "8"], r"cond_proj_dim.*\(rank\)"),
    ],
)
def test_impossible_settings_are_refused_with_name_value_and_remedy(stage, override, message):
    with pytest.raises(UserError, match=message):
        load_settings(ROOT / stage / "training" / "miniworld_config.py", override)
