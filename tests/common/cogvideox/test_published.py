"""Checkpoints from elsewhere in the published layout, against the reference's own weights, inputs and outputs."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from common.cogvideox.pipeline_io import load_component, load_components
from common.cogvideox.published import load_published_transformer
from common.config.errors import UserError
from common.data.control_signals import CONTROL_TOKENS
from common.tools import import_checkpoint
from tests.stages.conftest import load_objective

REFERENCE = Path(__file__).parents[2] / "fixtures" / "reference_2b_layout.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FIRST = "control_blocks.0.attn1.norm_k.bias"
PLAIN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "text_embed_dim": 24, "max_text_seq_length": 6,
    "sample_width": 12, "sample_height": 8, "sample_frames": 33, "time_embed_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> tuple[dict, dict, dict]:
    """Weights, config, and inputs with outputs, as published code made them."""
    with safe_open(REFERENCE, "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
        config = json.loads(f.metadata()["config"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    weights.pop("patch_embed.pos_embedding", None)  # not in checkpoints
    return weights, config, tensors


def write(path: Path, weights: dict, config: dict | None, shard_size: str | None = None) -> Path:
    path.mkdir(parents=True)
    if shard_size:
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(weights, path, filename_pattern=pattern, max_shard_size=shard_size)
    else:
        save_file(weights, path / WEIGHTS, {"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps({"_class_name": "SomeTransformer", **config}))
    return path


def assert_gives_the_references_outputs(model: torch.nn.Module, tensors: dict) -> None:
    inputs = {name: tensors[f"inputs.{name}"] for name in ("hidden_states", "encoder_hidden_states", "control_embeds")}
    out = model(**inputs, timestep=tensors["inputs.timestep"]).sample
    torch.testing.assert_close(out, tensors["outputs.per_frame_timestep"], rtol=1e-5, atol=1e-5)


FORMS = {
    "folder": lambda path, w, c: write(path / "x", w, c),
    "sharded": lambda path, w, c: write(path / "x", w, c, "20KB"),
    "file": lambda path, w, c: write(path / "x", w, c) / WEIGHTS,
    "no-config": lambda path, w, c: write(path / "x", w, None),
    "plain-config": lambda path, w, c: write(path / "x", w, PLAIN),
    "pipeline": lambda path, w, c: write(path / "x" / "transformer", w, c).parent,
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_gives_the_references_outputs(reference, tmp_path, form):
    weights, config, tensors = reference
    model = load_published_transformer(FORMS[form](tmp_path, weights, config), PLAIN)
    assert model.config.control_attention == "token_causal" and not model.config.control_temporal_position
    assert (model.config.control_start_layer, model.config.control_end_layer) == (2, 4)
    assert_gives_the_references_outputs(model, tensors)


MISTAKES = {
    "partial": (lambda w: {k: v for k, v in w.items() if k != FIRST}, rf"1 keys are missing \({FIRST}\)"),
    "foreign": (lambda w: w | {"ofs.bias": torch.ones(1)}, r"1 keys are not the model's \(ofs.bias\)"),
    "shape": (lambda w: w | {FIRST: torch.ones(3)}, rf"of another shape \({FIRST} \[3\], not \[16\]\)"),
    "no-control": (lambda w: {k: v for k, v in w.items() if "control" not in k}, "is no controlled transformer"),
    "prefix": (lambda w: {f"module.{k}": v for k, v in w.items()}, r"its first keys are module\.control_blocks"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "sharded", "file", "no-config"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_or_partial_ones_are_refused_with_their_keys(reference, tmp_path, form, mistake):
    weights, config, _ = reference
    damage, message = MISTAKES[mistake]
    checkpoint = FORMS[form](tmp_path, damage(weights), config)
    with pytest.raises(UserError, match=message) as error:
        load_published_transformer(checkpoint, PLAIN)
    assert str(checkpoint) in str(error.value)


def test_damaged_files_are_refused(reference, tmp_path):
    weights, config, _ = reference
    sharded = write(tmp_path / "sharded", weights, config, "20KB")
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"names 1 files that are missing \({gone.name}\)"):
        load_published_transformer(sharded, PLAIN)
    whole = write(tmp_path / "cut", weights, config) / WEIGHTS
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        load_published_transformer(whole, PLAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="should hold diffusion_pytorch_model.safetensors or shards with an index"):
        load_published_transformer(tmp_path / "empty", PLAIN)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_published_transformer(tmp_path / "nowhere", PLAIN)
    with pytest.raises(UserError, match=r"control layers \[3, 9\) do not lie within"):
        load_published_transformer(write(tmp_path / "x", weights, config), PLAIN, control_layers=(3, 9))


@pytest.fixture
def sentences(tmp_path) -> Path:
    file = tmp_path / "sentences.json"
    file.write_text(json.dumps({token: f"signal {token}" for token in CONTROL_TOKENS}))
    return file


@pytest.fixture
def imported(reference, tiny_base, tiny_clip, sentences, tmp_path, monkeypatch, capsys):
    """Runs the tool on the reference's weights; the pipeline's directory."""
    weights, config, _ = reference
    checkpoint = write(tmp_path / "downloads", weights, config, "20KB")

    def run(stage: int) -> Path:
        target = tmp_path / "models" / f"stage{stage}"
        words = {
            "checkpoint": checkpoint, "stage": stage, "base": tiny_base, "output_dir": target,
            "sentences_file": sentences, "control_text_encoder": tiny_clip,
        }  # fmt: skip
        flat = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
        monkeypatch.setattr("sys.argv", ["import_checkpoint", *flat])
        import_checkpoint.main()
        assert "control after layers 2 to 3, token_causal" in capsys.readouterr().out
        return target

    return run


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_the_tool_makes_what_the_stage_would_have_written(imported, reference, tiny_base, tmp_path, run_program, stage):
    target = imported(stage)
    parts = load_components(target)
    weights = parts["transformer"].state_dict()
    assert weights.keys() == reference[0].keys()
    assert all(torch.equal(weights[key], value) for key, value in reference[0].items())
    assert parts["control_vocabulary"].names == list(CONTROL_TOKENS)
    scheduler = load_component(tiny_base, "scheduler").config
    assert parts["scheduler"].config.snr_shift_scale == scheduler.snr_shift_scale
    if stage > 2:
        assert parts["scheduler"].num_window_frames == 9
    words = ["--prompt", "x", "--control", "D*9", "--height", 64, "--width", 96, "--output", tmp_path / "video.mp4"]
    steps = [] if stage == 4 else ["--num_inference_steps", 4]
    assert "9 frames" in run_program(f"stage{stage}/inference.py", "--model_path", target, *words, *steps)


@pytest.mark.parametrize("stage", [3, 4])
@torch.no_grad()
def test_a_next_stage_keeps_the_published_attention(imported, reference, tmp_path, stage):
    """What a stage writes that was loaded from an imported base, and not trained, computes what the reference does."""
    objective = load_objective(stage, imported(stage - 1), "--max_sequence_length", str(PLAIN["max_text_seq_length"]))
    objective.export(tmp_path / "exported")
    transformer = load_component(tmp_path / "exported", "transformer")
    assert transformer.config.control_attention == "token_causal"
    assert_gives_the_references_outputs(transformer, reference[2])


def test_what_the_tool_refuses(refused, reference, tiny_base, tiny_models, tiny_clip, sentences, tmp_path):
    weights, config, _ = reference
    checkpoint = write(tmp_path / "downloads", weights, config)
    words = {"checkpoint": checkpoint, "stage": 2, "base": tiny_base, "output_dir": tmp_path / "out"}
    named = {"sentences_file": sentences, "control_text_encoder": tiny_clip}

    def line(**more: object) -> str:
        flat = [word for name, value in {**words, **more}.items() for word in (f"--{name}", value)]
        told = refused(import_checkpoint.main, *flat)
        assert not (tmp_path / "out").exists()
        return told

    assert "give --sentences_file or --control_vocabulary" in line()
    assert "give --control_start_layer and --control_end_layer, or neither" in line(**named, control_end_layer=4)
    assert "here belongs a text-to-video pipeline" in line(**named, base=tiny_models / "stage2")
    assert "exists; choose another" in line(**named, output_dir=checkpoint)
    (tmp_path / "short.json").write_text('{"D": "ahead", "DL": 3}')
    assert "has no sentence for DL, DR, B" in line(sentences_file=tmp_path / "short.json")
    (tmp_path / "short.json").write_text("[]")
    assert "holds no object; write" in line(sentences_file=tmp_path / "short.json")
    from common.cogvideox.control_adapter import ControlVocabulary

    ControlVocabulary.orthogonal(list(CONTROL_TOKENS), 16).save_pretrained(tmp_path / "vocabulary")
    assert "takes signals of 12 numbers (its control_dim)" in line(control_vocabulary=tmp_path / "vocabulary")
