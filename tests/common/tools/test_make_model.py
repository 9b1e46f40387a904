"""Random models: as large as the published ones, readable by plain diffusers, sane through all layers."""

import json
import sys
import weakref

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from common.cogvideox import random_weights
from common.cogvideox.model_sizes import SIZES, ModelSize
from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline, CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_components, read_model_index
from common.cogvideox.random_weights import draw, untied_state
from common.cogvideox.stand_in_tokenizer import make_tokenizer
from common.tools import make_model

MINI = ["--size", "mini", "--layers", "2", "--output_dir"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "mini"
    make_model.make_model(path, SIZES["mini"].with_layers(2), max_shard_size="1MB")
    return path


@pytest.mark.parametrize("size", ["2b", "5b"])
def test_sizes_are_the_published_ones(size):
    """Parameters of the published weights: their files' sizes over two bytes; 1.6937 B is also the published control
    model's 2.0095 B less its adapter's 315.8 M."""
    published = {"2b": 1_693_783_872, "5b": 5_570_283_072}[size]
    with init_empty_weights(include_buffers=True):
        transformer = CogVideoXTransformer3DModel(**SIZES[size].transformer)
        text_encoder = T5EncoderModel(SIZES[size].t5_config(512))
        vae = AutoencoderKLCogVideoX(**SIZES[size].vae)
    assert sum(p.numel() for p in transformer.parameters()) == published
    assert sum(v.numel() for v in untied_state(text_encoder).values()) == 4_762_310_656
    assert sum(p.numel() for p in vae.parameters()) == 215_583_907
    assert text_encoder.config.d_model == transformer.config.text_embed_dim


# What the two published transformer_config.json, vae_config.json and scheduler_config.json say, where they differ.
PUBLISHED_DIFFERENCES = {
    "2b": (30, 30, False, 1.15258426, 3.0, torch.float16),
    "5b": (48, 42, True, 0.7, 1.0, torch.bfloat16),
}


@pytest.mark.parametrize("size", PUBLISHED_DIFFERENCES)
def test_configs_are_the_published_ones(size):
    one, scheduler = SIZES[size], SIZES[size].scheduler().config
    names = ("num_attention_heads", "num_layers", "use_rotary_positional_embeddings")
    found = [*(one.transformer[name] for name in names), one.vae["scaling_factor"]]
    assert (*found, scheduler.snr_shift_scale, one.dtype) == PUBLISHED_DIFFERENCES[size]
    t5 = T5Config(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
    for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size", "dense_act_fn", "is_gated_act"):
        assert getattr(one.t5_config(512), name) == getattr(t5, name), name
    assert scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing == "trailing"


def test_plain_diffusers_runs_it(mini):
    pipeline = CogVideoXPipeline.from_pretrained(mini)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red car", num_frames=9, num_inference_steps=2, max_sequence_length=64, output_type="np").frames
    assert frames.shape == (1, 9, 64, 96, 3) and np.isfinite(frames).all() and frames.std() > 0.05


def test_every_weight_is_there_and_in_shards(mini):
    assert read_model_index(mini, expected="CogVideoXPipeline")
    assert len(list((mini / "vae").glob("*.safetensors"))) > 4  # of 1 MB each
    parts = load_components(mini, torch.float32)  # refuses a missing or unexpected key
    for name in ("transformer", "vae", "text_encoder"):
        for key, value in parts[name].state_dict().items():
            constant = value.ndim == 1 and (torch.all(value == 0) or torch.all(value == 1))
            assert constant or value.std() > 0, key


def test_the_same_seed_gives_the_same_weights_in_other_shards(mini, tmp_path):
    make_model.make_model(tmp_path / "again", SIZES["mini"].with_layers(2))
    make_model.make_model(tmp_path / "other", SIZES["mini"].with_layers(2), seed=7, dtype=torch.bfloat16)
    first, again, other = (load_components(path) for path in (mini, tmp_path / "again", tmp_path / "other"))
    weights = [parts["transformer"].proj_out.weight for parts in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    config = json.loads((tmp_path / "other" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotary", [False, True], ids=["sincos", "rotary"])
def test_activations_keep_their_size_through_forty_layers(dtype, rotary):
    """And each block does something: a stand-in whose blocks change nothing would hide what is measured on it."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, num_layers=42, text_embed_dim=64, max_text_seq_length=8, sample_width=8, sample_height=8,
        sample_frames=9, use_rotary_positional_embeddings=rotary,
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model.load_state_dict({k: draw(model, k, v.shape, generator) for k, v in model.state_dict().items()})
    nn.Module.to(model, dtype)  # diffusers' own warns
    sizes = []
    for block in model.transformer_blocks:
        block.register_forward_hook(
            lambda _, args, kwargs, outputs: sizes.append((kwargs["hidden_states"], outputs[0])), with_kwargs=True
        )
    rotation = (torch.ones(48, 64), torch.zeros(48, 64)) if rotary else None
    with torch.no_grad():
        video, text = torch.randn(1, 3, 16, 8, 8, generator=generator), torch.randn(1, 8, 64, generator=generator)
        timestep = torch.tensor([999])
        out = model(video.to(dtype), text.to(dtype), timestep, image_rotary_emb=rotation, return_dict=False)[0]
    for before, after in sizes:
        assert 0.3 < after.float().std() < 10
        assert 0.02 < (after - before).float().norm() / before.float().norm() < 1
    assert torch.isfinite(out).all() and 0.3 < out.float().std() < 3


def test_t5_is_drawn_as_transformers_draws_it():
    config = T5Config(d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, vocab_size=512, feed_forward_proj="gated-gelu")  # fmt: skip  # noqa: E501
    torch.manual_seed(0)
    theirs, generator = T5EncoderModel(config), torch.Generator().manual_seed(0)
    for key, value in untied_state(theirs).items():
        ours = draw(theirs, key, value.shape, generator)
        assert ours.std().item() == pytest.approx(value.std().item(), rel=0.15, abs=1e-6), key
        assert ours.mean().item() == pytest.approx(value.mean().item(), abs=0.1), key


def test_the_small_text_encoder_feeds_the_transformer_the_published_shapes():
    one = SIZES["5b"].with_small_text_encoder()
    tokenizer = make_tokenizer(226)
    encoder = T5EncoderModel(one.t5_config(len(tokenizer)))
    assert sum(p.numel() for p in encoder.parameters()) < 20e6
    tokens = tokenizer("A red car.", padding="max_length", max_length=226, return_tensors="pt")
    assert int(tokens.input_ids.max()) < encoder.config.vocab_size
    assert encoder(tokens.input_ids).last_hidden_state.shape == (1, 226, 4096)


def test_the_tokenizer_knows_words_spells_others_and_survives_saving(tmp_path):
    tokenizer = make_tokenizer(64)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "A red car drives, past zebra #7."
    ids = again(text).input_ids
    assert ids == tokenizer(text).input_ids and ids[-1] == again.eos_token_id and again.unk_token_id not in ids
    assert again.tokenize("A red car") == ["▁A", "▁red", "▁car"]
    assert again.decode(ids, skip_special_tokens=True) == text
    assert len(again("word " * 200, truncation=True).input_ids) == again.model_max_length == 64


def test_only_one_shard_is_in_memory(tmp_path, monkeypatch):
    """Twenty layers of 1 MB, files of 2 MB."""
    with init_empty_weights():
        model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(20)))
    drawn, alive, told = [], [], []

    def watched(*arguments):
        tensor = draw(*arguments)
        alive.append(sum(reference() is not None for reference in drawn))
        drawn.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(random_weights, "draw", watched)
    random_weights.write_random_weights(model, tmp_path, "model", torch.float32, 0, "2.5MB", told.append)
    assert told == [2**20] * 20 and max(alive) == 1  # of a shard's two, one is there when the other is drawn
    assert len(list(tmp_path.glob("*.safetensors"))) == 10


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["make_model", *map(str, words)])
    make_model.main()


def test_the_tool_refuses_to_overwrite_unless_told(refused, monkeypatch, tmp_path, capsys):
    path = tmp_path / "deep" / "model"
    run(monkeypatch, *MINI, path)
    assert "transformer 1." in capsys.readouterr().out
    (path / "notes.txt").touch()
    assert "exists; choose another, or --overwrite" in refused(make_model.main, *MINI, path)
    assert (path / "notes.txt").exists()
    assert "is no pipeline directory" in refused(make_model.main, *MINI, path.parent, "--overwrite")
    run(monkeypatch, *MINI, path, "--overwrite", "--dtype", "bfloat16")
    assert not (path / "notes.txt").exists() and [p.name for p in path.parent.iterdir()] == ["model"]
    assert "'some' is no size; write 500MB" in refused(
        make_model.main, *MINI, tmp_path / "x", "--max_shard_size", "some"
    )


def test_a_full_disk_is_refused_before_anything_is_written(refused, monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 10_000_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    line = refused(make_model.main, "--size", "2b", "--output_dir", tmp_path / "new" / "2b")
    assert "needs 13.3 GB" in line and "has 10.0 GB free" in line and "--small_text_encoder" in line
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_the_old_model(monkeypatch, tmp_path):
    path = tmp_path / "model"
    run(monkeypatch, *MINI, path)
    monkeypatch.setattr(ModelSize, "scheduler", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, *MINI, path, "--overwrite")
    assert read_model_index(path) and [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_a_stages_output_is_complete_and_makes_video(tmp_path, stage):
    make_model.make_model(tmp_path / "model", SIZES["mini"].with_layers(2), stage=stage)
    kind = CogVideoXControlPipeline if stage == 2 else CogVideoXStreamingPipeline
    pipeline = kind.from_pretrained(tmp_path / "model")
    if stage == 2:
        frames = pipeline("a red car", num_frames=5, num_inference_steps=1, control_signal="D", output_type="np").frames
    else:
        frames = next(pipeline.stream("a red car", "D", num_inference_steps=4, seed=0))
    assert frames.std() > 0
    assert pipeline.transformer.config.control_dim == pipeline.control_vocabulary.control_dim == 64
    assert [*SIZES["2b"].control_config().values()][:3] == [768, 15, 30]  # as published
