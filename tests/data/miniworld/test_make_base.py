"""The base model: a directory that plain diffusers loads and samples from, the same after a kill as without one."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline
from transformers import T5EncoderModel, T5Tokenizer

from common.config.errors import UserError
from common.data.video import read_clip
from common.training.encoding import encode_prompts
from data.miniworld import base_text, make_base, make_videos
from data.miniworld.base_training import Budget, fit, learning_rate
from data.miniworld.base_transformer import v_loss as base_v_loss
from data.miniworld.captions import BIOME_WORDS, COLORS, WEATHER_WORDS
from data.miniworld.looks import random_look

CAPTIONS = [random_look(seed)[1] for seed in range(150)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    text = f"--output_dir {folder} --num_clips 3 --num_frames 9 --height 32 --width 64 --num_workers 0"
    make_videos.make_videos(make_videos.parse_arguments(text.split()))
    return folder


def arguments(world, output_dir, *more):
    settings = {
        "data_root": world, "output_dir": output_dir, "height": 32, "width": 64, "num_frames": 9, "num_heldout": 1,
        "vae_steps": 4, "vae_batch_size": 1, "vae_image_batch_size": 2, "transformer_steps": 3, "num_layers": 1,
        "num_heads": 1, "transformer_batch_size": 2, "transformer_windows": 2, "device": "cpu",
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return make_base.parse_arguments([*flags, *more])


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    return make_base.make_base(arguments(world, tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def tokenizer():
    return base_text.train_tokenizer(CAPTIONS)


def pipeline_that_samples(directory):
    pipeline = CogVideoXPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        CAPTIONS[0], height=32, width=64, num_frames=9, num_inference_steps=2, max_sequence_length=64,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames  # fmt: skip
    assert video.shape == (1, 9, 3, 32, 64) and torch.isfinite(video).all()
    return pipeline


def test_diffusers_loads_it_and_samples_from_it(base):
    pipeline = pipeline_that_samples(base)
    schedule = pipeline.scheduler.config
    assert (schedule.prediction_type, schedule.snr_shift_scale) == ("v_prediction", 3.0)
    assert schedule.rescale_betas_zero_snr and schedule.timestep_spacing == "trailing"
    assert not (base / ".partial").exists()


def test_it_can_be_a_small_5b(world, tmp_path):
    """Rotary positions, 5B's noise schedule; diffusers samples from it."""
    more = ["--positions", "rotary", "--snr_shift_scale", "1"]
    pipeline = pipeline_that_samples(make_base.make_base(arguments(world, tmp_path / "base", *more)))
    assert pipeline.transformer.config.use_rotary_positional_embeddings
    assert pipeline.scheduler.config.snr_shift_scale == 1.0


def test_trained_with_the_positions_that_diffusers_samples_with(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(make_base.base_transformer, "v_loss", lambda *a: (seen.append(a), base_v_loss(*a))[1])
    base = make_base.make_base(arguments(world, tmp_path / "base", "--positions", "rotary", "--transformer_steps", "1"))
    pipeline = CogVideoXPipeline.from_pretrained(base)
    expected = pipeline._prepare_rotary_positional_embeddings(32, 64, 3, torch.device("cpu"))
    torch.testing.assert_close(seen[0][1], expected)


def test_scaling_factor_gives_latents_unit_variance(base, world):
    vae = CogVideoXPipeline.from_pretrained(base).vae
    index = json.loads((world / "index.json").read_text())["list"]
    clips = torch.stack([read_clip(world / entry["path"], 9, 32, 64, 16) for entry in index[:2]])
    with torch.no_grad():
        latents = vae.encode(clips.transpose(1, 2).float() / 127.5 - 1).latent_dist.sample() * vae.config.scaling_factor
    assert 0.8 < latents.std() < 1.25


def test_killed_run_goes_on_and_ends_the_same(base, world, tmp_path, monkeypatch):
    calls = []

    def fit_that_dies(model, optimizer, batch_of_step, *rest, **options):
        def dying(step, progress):
            if step == 2 and not calls:
                calls.append(step)
                raise KeyboardInterrupt
            return batch_of_step(step, progress)

        return fit(model, optimizer, dying, *rest, checkpoint_seconds=0.0, **options)

    monkeypatch.setattr(make_base, "fit", fit_that_dies)
    with pytest.raises(KeyboardInterrupt):
        make_base.make_base(arguments(world, tmp_path / "base"))
    assert not (tmp_path / "base" / "model_index.json").exists()
    make_base.make_base(arguments(world, tmp_path / "base"))
    for part in ("vae", "transformer"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "base" / file).read_bytes() == (base / file).read_bytes()


def training_that_fails(tmp_path, loss_of_step):
    """`fit` for 4 steps of one weight, all saved, with `loss_of_step(step, weight)`; → the refusal, the last save."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint = tmp_path / "model.pt"
    with pytest.raises(UserError) as refusal:
        fit(
            model, optimizer, lambda step, _: {"step": torch.tensor(step)},
            lambda batch: loss_of_step(int(batch["step"]), model.weight.sum()),
            Budget(4), checkpoint, "part", checkpoint_seconds=0.0,
        )  # fmt: skip
    return str(refusal.value), torch.load(checkpoint, weights_only=True)


@pytest.mark.parametrize(
    "failing",
    [lambda weight: weight * torch.nan, lambda weight: (weight * 0).sqrt()],  # the second: its gradient alone
    ids=["loss", "gradient"],
)
@pytest.mark.parametrize("step", [2, 3])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, failing, step):
    def loss_of_step(at, weight):
        return failing(weight) if at == step else weight.square()

    told, saved = training_that_fails(tmp_path, loss_of_step)
    assert told.startswith("part: the loss is ") and f"at step {step + 1}" in told
    assert "lower learning rate and another --output_dir" in told
    assert saved["step"] == step and saved["model"]["weight"].isfinite().all()


def test_other_settings_in_the_same_directory_are_refused(base, world):
    with pytest.raises(ValueError, match="vae_steps 4 -> 5"):
        make_base.make_base(arguments(world, base, "--vae_steps", "5"))


def test_complete_directory_is_left_alone(base, world):
    before = (base / "vae" / "config.json").stat().st_mtime_ns
    make_base.make_base(arguments(world, base))
    assert (base / "vae" / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_frames", "32"], "4n"),
        (["--width", "50"], "multiples of 16"),
        (["--num_frames", "33"], "00000.mp4: 9 frames"),
        (["--num_heldout", "3"], "leaves none"),
    ],
)
def test_impossible_settings_are_refused(world, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        make_base.make_base(arguments(world, tmp_path / "base", *more))


def test_tokenizer_knows_every_caption_and_reloads_as_itself(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) > 200
    for caption in [*CAPTIONS, *(random_look(seed)[1] for seed in range(1000, 1100))]:
        ids = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= base_text.MAX_TEXT_LENGTH
        assert loaded(caption).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert tokenizer.unk_token_id not in tokenizer("Quickly, 7 zebras jump & vanish!").input_ids


def test_different_words_are_different_ids(tokenizer):
    words = [*COLORS, *BIOME_WORDS, *WEATHER_WORDS]
    ids = {word: tuple(tokenizer(word).input_ids) for word in words}
    assert len(set(ids.values())) == len(words)


def test_random_text_encoder_tells_captions_apart(tokenizer):
    encoder = base_text.make_text_encoder(len(tokenizer), seed=0)
    assert isinstance(encoder, T5EncoderModel) and not any(p.requires_grad for p in encoder.parameters())
    texts = ["A red car drives through snow.", "A blue car drives through snow.", "A red car drives through fog.", ""]
    embeds = encode_prompts(tokenizer, encoder, texts, base_text.MAX_TEXT_LENGTH)
    assert embeds.shape == (4, base_text.MAX_TEXT_LENGTH, base_text.TEXT_DIM)
    assert 0.5 < embeds.std() < 2
    distance = torch.cdist(embeds.flatten(1), embeds.flatten(1)) / embeds.flatten(1).norm(dim=1).mean()
    assert distance[~torch.eye(4, dtype=torch.bool)].min() > 0.1


def test_learning_rate_warms_up_and_ends_at_zero():
    first, middle = learning_rate(0.0, 1.0), learning_rate(0.025, 1.0)
    assert first < 0.1 and 0.3 < middle < 0.7
    assert learning_rate(0.06, 1.0) > 0.95 and learning_rate(1.0, 1.0) < 1e-6
    assert Budget(steps=10).progress(5, 1e9) == 0.5 and Budget(minutes=2).progress(99, 60.0) == 0.5
