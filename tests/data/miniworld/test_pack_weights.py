"""What is shipped: complete pipeline directories in half precision, nothing twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import LORA_NAME
from common.config.errors import UserError
from data.miniworld import pack_weights

SHIPPED = Path(pack_weights.__file__).parent


def packed(output_dir, *pipelines):
    return pack_weights.pack(pack_weights.parse_arguments(["--output_dir", str(output_dir), *pipelines]))


def test_packed_pipelines_load_and_share_what_is_equal(tiny_models, tiny_base, tmp_path):
    source = shutil.copytree(tiny_base, tmp_path / "source")
    config = source / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "somewhere/else"}))
    tmp_path /= "packed"
    size = packed(tmp_path, f"base={source}", f"stage3={tiny_models / 'stage3'}")
    assert (tmp_path / "stage3" / "vae").readlink().as_posix() == "../base/vae"
    assert not (tmp_path / "stage3" / "transformer").is_symlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert size == sum({path.resolve(): path.stat().st_size for path in files}.values())
    assert not any("_name_or_path" in path.read_text() for path in tmp_path.rglob("*.json"))
    plain = CogVideoXPipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    assert next(plain.transformer.parameters()).dtype == torch.float32
    ours = CogVideoXStreamingPipeline.from_pretrained(tmp_path / "stage3", torch_dtype=torch.float32)
    original = CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage3")
    for (name, a), b in zip(ours.transformer.named_parameters(), original.transformer.parameters(), strict=True):
        assert torch.equal(a, b.half().float()), name
    assert ours.scheduler.config == original.scheduler.config
    for file in (tmp_path / "stage3").rglob("*.safetensors"):
        assert all(not t.is_floating_point() or t.dtype == torch.float16 for t in load_file(file).values())


def test_a_lora_keeps_its_rank_and_alpha(tmp_path):
    (tmp_path / "stage1").mkdir()
    metadata = {"transformer.r": "2", "transformer.lora_alpha": "1"}
    save_file({"a": torch.full((2, 2), 0.3)}, tmp_path / "stage1" / LORA_NAME, metadata=metadata)
    size = packed(tmp_path / "packed", f"stage1={tmp_path / 'stage1'}")
    assert [file.name for file in (tmp_path / "packed" / "stage1").iterdir()] == [LORA_NAME]
    with safe_open(tmp_path / "packed" / "stage1" / LORA_NAME, framework="pt") as file:
        assert file.metadata() == metadata and file.get_tensor("a").dtype == torch.float16
    assert size == (tmp_path / "packed" / "stage1" / LORA_NAME).stat().st_size


def test_what_is_no_pipeline_or_too_large_is_refused(tiny_base, tmp_path, monkeypatch):
    for word in (str(tiny_base), f"={tiny_base}", f"../base={tiny_base}", "base=", f"base={tmp_path}"):
        with pytest.raises(UserError, match="NAME=DIRECTORY"):
            packed(tmp_path, word)
    source = shutil.copytree(tiny_base, tmp_path / "base")
    with pytest.raises(UserError, match="over itself"):
        packed(tmp_path, f"base={source}")
    CogVideoXPipeline.from_pretrained(source)  # is as it was
    monkeypatch.setattr(pack_weights, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="are shipped"):
        packed(tmp_path, f"base={tiny_base}")


def test_the_weights_that_are_shipped_take_40_mb_at_most():
    sizes = [path.stat().st_size for path in (SHIPPED / "weights").rglob("*") if path.is_file()]
    assert 30e6 < sum(sizes) <= 40e6 and max(sizes) <= pack_weights.LARGEST_FILE
