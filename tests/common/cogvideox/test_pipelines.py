"""The pipelines with real (tiny, untrained) models: against diffusers' own, and as streams of frames."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline, CogVideoXStreamingPipeline
from common.cogvideox.scheduler import (
    CogVideoXSwinDDIMScheduler,
    CogVideoXSwinDPMScheduler,
    CogVideoXSwinLCMScheduler,
)
from common.config.errors import UserError
from tests.common.cogvideox.tiny_pipelines import NAMES, PROMPT, SIZE, controlled, generator
from tests.conftest import make_tiny_components


@pytest.fixture(scope="module")
def base():
    return make_tiny_components()


@pytest.fixture(scope="module")
def streaming(base):
    """Stage 3: DDIM, W=1."""
    pipe = CogVideoXStreamingPipeline(**controlled(base, CogVideoXSwinDDIMScheduler(frames_per_group=1)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# A whole clip


def test_a_clip_obeys_its_signals_and_reads_each_frames_own(base):
    pipe = CogVideoXControlPipeline(**controlled(base, CogVideoXDDIMScheduler.from_config(base["scheduler"].config)))
    pipe.set_progress_bar_config(disable=True)

    def clip(signal, **more):
        arguments = {"num_frames": 9, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
        return pipe(PROMPT, control_signal=signal, generator=generator(), **{**arguments, **more}, **SIZE).frames

    by_name, by_index = clip(["D"] * 4 + ["DL"] * 4 + ["B"]), clip([0, 1, 3])
    assert torch.equal(by_name, by_index)
    assert not torch.equal(by_name, clip([0, 1, 6])) and not torch.equal(by_name, clip(None))
    assert torch.equal(clip(None), clip([-1, -1, -1]))
    pair = pipe(
        [PROMPT] * 2, control_signal=[[0, 1, 3], [6, 6, 6]], num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        output_type="latent", generator=[generator(), generator()], **SIZE,
    ).frames  # fmt: skip
    torch.testing.assert_close(pair[:1], by_index, rtol=0, atol=1e-5)
    assert (clip([0, 1, 3], control_guidance_scale=4.0) - by_name).abs().max() > 1e-4
    rising = clip([0, 1, 3], guidance_scale=6.0, use_dynamic_cfg=True)
    assert not torch.equal(rising, clip([0, 1, 3], guidance_scale=6.0)) and torch.isfinite(rising).all()


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"control_signal": ["D"] * 8}, "8 control signals for a clip that needs 9"),
        ({"control_signal": ["D"] * 8 + ["UP"]}, "'UP'"),
        ({"num_frames": 10}, "num_frames 10"),
        ({"height": 40}, "multiples of 16"),
        ({"control_signal": [[0, 0, 0]] * 2}, "2 control signals for 1 prompts"),
    ],
)
def test_impossible_clips_are_refused_in_one_line(streaming, arguments, word):
    with pytest.raises(UserError, match=word) as error:
        streaming(PROMPT, **{"num_frames": 9, "num_inference_steps": 2, **SIZE, **arguments})
    assert "\n" not in str(error.value)


# Streams


def collect(pipe, count, **arguments):
    stream = pipe.stream(**{"prompt": PROMPT, "num_inference_steps": 4, "seed": 0, **SIZE, **arguments})
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("cls", [CogVideoXSwinDPMScheduler, CogVideoXSwinDDIMScheduler, CogVideoXSwinLCMScheduler])
def test_chunks_are_frames_from_the_first_on(base, cls, width):
    pipe = CogVideoXStreamingPipeline(**controlled(base, cls(frames_per_group=width)))
    chunks = collect(pipe, 3, control="D")
    assert [c.shape for c in chunks] == [(1 + 4 * width, 32, 48, 3), *[(4 * width, 32, 48, 3)] * 2]
    assert all(c.dtype == np.uint8 and c.std() > 0 for c in chunks)


def test_a_stream_is_fixed_by_its_seed_alone_and_the_next_starts_fresh(streaming):
    first, again, other = (collect(streaming, 3, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    longer = collect(streaming, 4, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, longer, strict=False))
    by_generator = collect(streaming, 1, seed=None, generator=generator(5))
    assert np.array_equal(first[0], by_generator[0])


def test_a_stream_ends_where_it_is_told(streaming):
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 0, **SIZE}
    assert [len(c) for c in streaming.stream(**arguments, num_chunks=2)] == [5, 4]
    assert [len(c) for c in streaming.stream(**arguments, seconds=10 / 16)] == [5, 4, 4]
    assert [len(c) for c in streaming.stream(**arguments, seconds=10 / 8, fps=4)] == [5]


def test_control_and_guidance_change_the_stream_from_the_frames_they_reach_on(streaming):
    plain = collect(streaming, 3, control=[0] * 20)
    turned = collect(streaming, 3, control=[0] * 6 + [3] * 14)
    by_name = collect(streaming, 3, control=["D"] * 80)
    assert all(np.array_equal(a, b) for a, b in zip(by_name, plain, strict=True))
    assert np.array_equal(collect(streaming, 1, control=lambda: "D")[0], plain[0])
    assert not np.array_equal(turned[2], plain[2])
    for scales in ({"guidance_scale": 6.0}, {"control_guidance_scale": 4.0}):
        assert not np.array_equal(collect(streaming, 1, control=[0] * 20, **scales)[0], plain[0])


def test_text_is_encoded_once_and_not_later(streaming, monkeypatch):
    calls = []
    encode = streaming.text_encoder.forward
    monkeypatch.setattr(streaming.text_encoder, "forward", lambda *a, **k: calls.append(1) or encode(*a, **k))
    stream = streaming.stream(PROMPT, num_inference_steps=4, seed=0, **SIZE)
    encoded = len(calls)
    next(stream), next(stream)
    assert 1 <= encoded <= 2 and len(calls) == encoded


def test_embeddings_may_be_given_instead_of_a_prompt(streaming):
    embeds, negative = streaming.encode_prompt(PROMPT, max_sequence_length=16)
    without_encoder = CogVideoXStreamingPipeline(**{**streaming.components, "text_encoder": None})
    given = collect(without_encoder, 1, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    # The latents differ by 5e-7, so a pixel may round to the neighbouring level.
    assert np.abs(given[0].astype(int) - collect(streaming, 1)[0]).max() <= 1


def test_a_stream_begins_in_the_end_of_its_init_video(streaming):
    video = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    start = collect(streaming, 1, init_video=video, height=None, width=None)[0]
    assert start.shape == (5, 32, 48, 3)
    assert np.array_equal(start, collect(streaming, 1, init_video=video[-17:].transpose(0, 3, 1, 2))[0])
    assert not np.array_equal(start, collect(streaming, 1, init_video=video[:-1])[0])
    with torch.no_grad():  # the condition frame is the init video's, encoded and handed on
        pixels = torch.from_numpy(video[-17:]).movedim(-1, 0)[None].float() / 127.5 - 1
        latent = streaming.vae.encode(pixels).latent_dist.mode()[:, :, 0] * streaming.vae.config.scaling_factor
    latents = streaming.stream(PROMPT, init_video=video, num_inference_steps=4, seed=0).advance()
    torch.testing.assert_close(latents[:, 0], latent)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"init_video": np.zeros((16, 32, 48, 3), np.uint8)}, "16 frames; the model's window needs 17"),
        ({"init_video": np.zeros((17, 32, 64, 3), np.uint8)}, "32×64, the stream 32×48"),
        ({"init_video": np.zeros((17, 32, 48, 3), np.float32)}, "not uint8"),
        ({"num_inference_steps": 6}, "6 inference steps"),
        ({"control": ["D"], "prompt": [PROMPT] * 2}, "2 prompts need a list"),
        ({"height": 36}, "multiples of 16"),
        ({"guidance_scale": 0.0}, "guidance_scale 0: 1 is for no guidance"),
        ({"prompt": None}, "`prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 16, 32)}, "both `prompt`.*and `prompt_embeds`"),
        ({"prompt": [PROMPT] * 2, "control": (name for name in "DD")}, "2 prompts need a list"),
        ({"prompt": [PROMPT] * 2, "init_video": np.zeros((3, 17, 32, 48, 3), np.uint8)}, "3 videos for 2 streams"),
        ({"prompt": [PROMPT] * 2, "generator": [generator()] * 3}, "3 generators for 2 streams"),
    ],
)
def test_impossible_streams_are_refused_before_anything_runs(streaming, arguments, word):
    with pytest.raises((UserError, ValueError), match=word):  # a ValueError where diffusers has one
        streaming.stream(**{"prompt": PROMPT, "num_inference_steps": 4, **SIZE, **arguments})


def test_several_streams_at_once(streaming):
    generators = [generator(1), generator(2)]
    both = collect(streaming, 2, prompt=[PROMPT, "snow"], control=["D", [3] * 9], generator=generators)
    assert [c.shape for c in both] == [(2, 5, 32, 48, 3), (2, 4, 32, 48, 3)]
    alone = collect(streaming, 2, prompt="snow", control=[3] * 9, generator=generator(2))
    for a, b in zip(alone, both, strict=True):
        assert np.abs(a.astype(int) - b[1]).max() <= 1


def test_directories_round_trip_and_say_what_they_are(streaming, tmp_path):
    streaming.save_pretrained(tmp_path)
    loaded = CogVideoXStreamingPipeline.from_pretrained(tmp_path)
    for a, b in zip(collect(streaming, 2, control="DL"), collect(loaded, 2, control="DL"), strict=True):
        assert np.array_equal(a, b)
    half = CogVideoXStreamingPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert [len(c) for c in collect(half, 2, control="DL")] == [5, 4]
    replaced = CogVideoXStreamingPipeline.from_pretrained(tmp_path, scheduler=CogVideoXSwinLCMScheduler())
    assert isinstance(replaced.scheduler, CogVideoXSwinLCMScheduler)
    assert CogVideoXControlPipeline.from_pretrained(tmp_path).control_vocabulary.names == NAMES


def test_a_base_model_is_no_stream(tiny_base):
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler; streaming needs"):
        CogVideoXStreamingPipeline.from_pretrained(tiny_base)
    assert CogVideoXControlPipeline.from_pretrained(tiny_base).control_vocabulary is None


def test_a_vocabulary_of_another_model_is_refused(base):
    parts = controlled(base, CogVideoXSwinDDIMScheduler())
    with pytest.raises(UserError, match="control_dim is 12, the control vocabulary's 16"):
        CogVideoXStreamingPipeline(**{**parts, "control_vocabulary": ControlVocabulary.orthogonal(NAMES, 16)})


def test_what_from_pretrained_does_not_do_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(TypeError, match="takes torch_dtype and components, not device_map, revision"):
        CogVideoXControlPipeline.from_pretrained(tmp_path / "nowhere", device_map="cuda", revision="main")


def test_a_distilled_model_is_told_its_guidance_scale_in_one_forward(base):
    scheduler = CogVideoXSwinLCMScheduler(frames_per_group=1, guidance_range=[1.0, 7.0])
    pipe = CogVideoXStreamingPipeline(**controlled(base, scheduler, cond_proj_dim=8))
    torch.nn.init.normal_(pipe.transformer.time_embedding.cond_proj.weight, generator=generator())
    forwards = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    weak, strong = (collect(pipe, 2, num_inference_steps=None, guidance_scale=scale) for scale in (1.0, 7.0))
    assert forwards == [1] * (4 + 2) * 2  # four phases to start from text, then one forward a shift
    assert not np.array_equal(weak[0], strong[0])
    for scales in ({"guidance_scale": 7.5}, {"guidance_scale": 2.0, "control_guidance_scale": 2.0}):
        with pytest.raises(UserError, match=r"learnt its guidance .* it takes (1 … 7|1)$"):
            collect(pipe, 1, num_inference_steps=None, **scales)
        with pytest.raises(UserError, match=r"learnt its guidance .* it takes (1 … 7|1)$"):
            pipe(PROMPT, num_frames=17, num_inference_steps=4, **scales, **SIZE)


def test_rotary_positions_stream_too():
    parts = make_tiny_components(rotary=True)
    pipe = CogVideoXStreamingPipeline(**controlled(parts, CogVideoXSwinDDIMScheduler(frames_per_group=1)))
    assert [len(c) for c in collect(pipe, 2, control="D")] == [5, 4]
