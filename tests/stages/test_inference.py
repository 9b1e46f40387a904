"""The four inference.py and the contact sheet as a user runs them: what is in the files that they write."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from decord import VideoReader
from PIL import Image

from common.cogvideox.light_decoder import LightStreamingDecoder, LightVideoDecoder
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_component, write_pipeline
from common.cogvideox.streaming import VideoStream
from common.tools import contact_sheet, inference

SIZE = ["--height", 32, "--width", 64]  # decord cannot read H.264 narrower than 64
ROOT = Path(__file__).parents[2]
TWO_STEPS = ["--num_inference_steps", 2]
FOUR_STEPS = ["--num_inference_steps", 4, "--guidance_scale", 1]  # one a noise group


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_models) -> Path:
    """tiny_models whose control adapter acts: one that is new does nothing."""
    root = tmp_path_factory.mktemp("acting")
    transformer = load_component(tiny_models / "stage2", "transformer")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.control_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for stage, kind in ((2, "Control"), (3, "Streaming"), (4, "Streaming")):
        base = tiny_models / f"stage{stage}"
        write_pipeline(root / f"stage{stage}", base, f"CogVideoX{kind}Pipeline", {"transformer": transformer})
    return root


@pytest.fixture
def make(run_program, models, tmp_path):
    """Makes a video by a stage; `make(4, "a.mp4", …)` → its path. Models of stage 1 are given by --model_path."""

    def run(stage: int, name: str, *words: object) -> Path:
        output = tmp_path / name
        model = [] if stage == 1 else ["--model_path", models / f"stage{stage}"]
        said = run_program(f"stage{stage}/inference.py", *model, "--prompt", "x", *SIZE, *words, "--output", output)
        assert said.startswith(f"{output}: ")
        return output

    return run


def frames(path: Path) -> np.ndarray:
    """[N,h,w,3] as other software reads them."""
    reader = VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy()


def about(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_stage_1_beside_its_lora_equals_fused(make, run_program, tiny_base, tiny_lora, tmp_path):
    words = ["--pretrained_model_path", tiny_base, "--lora_path", tiny_lora, "--output_dir", tmp_path / "fused"]
    assert "fused pipeline" in run_program("stage1/fuse_lora_weights.py", *words)
    call = ["--num_frames", 9, *TWO_STEPS, "--seed", 3, "--fps", 8]
    beside = make(1, "beside.mp4", "--model_path", tiny_base, "--lora_path", tiny_lora, *call)
    fused = make(1, "fused.mp4", "--model_path", tmp_path / "fused", *call)
    plain = make(1, "plain.mp4", "--model_path", tiny_base, *call)
    assert len(frames(make(1, "even.mp4", "--model_path", tiny_base, "--num_frames", 13, *TWO_STEPS))) == 13
    assert frames(fused).shape == (9, 32, 64, 3) and VideoReader(str(fused)).get_avg_fps() == pytest.approx(8)
    difference = np.abs(frames(fused).astype(int) - frames(beside))
    assert difference.max() <= 4 and difference.mean() < 0.1  # a rounding apart
    assert np.abs(frames(plain).astype(int) - frames(beside)).mean() > 1
    assert about(beside)["lora_path"] == str(tiny_lora) and about(beside)["control"] is None


def test_stage_2_obeys_a_control_string_or_file(make, tmp_path, caplog):
    drive = tmp_path / "drive.txt"
    drive.write_text("# a drive\nD*4,\nDL*7  # left\n")
    straight = make(2, "straight.mp4", "--control", "D*11", *TWO_STEPS)
    left = make(2, "left.mp4", "--control", "D*4,DL*7", *TWO_STEPS)
    from_file = make(2, "file.mp4", "--control_file", drive, *TWO_STEPS)
    assert frames(left).shape == (9, 32, 64, 3)  # 4n+1 of the 11 that are controlled
    assert "the last 2 raw frames of the control string are left out" in caplog.text
    assert from_file.read_bytes() == left.read_bytes() != straight.read_bytes()
    assert about(from_file)["control"] == "D,D,D,D,DL,DL,DL,DL,DL,DL,DL" and about(from_file)["num_frames"] == 9
    short = make(2, "short.mp4", "--control", "D*4,DL*7", "--num_frames", 5, "--control_guidance_scale", 2, *TWO_STEPS)
    assert len(frames(short)) == 5  # diffusers makes 8 of two latent frames


@pytest.mark.parametrize("stage", [3, 4])
def test_streams_have_the_length_asked_for_and_depend_on_the_seed_alone(make, stage):
    call = ["--control", "D*8,DL*8", "--groups", 2, *FOUR_STEPS]
    first = make(stage, "first.mp4", *call)
    assert frames(first).shape == (17, 32, 64, 3)  # 1 + 2 shifts of 2 latent frames of 4
    record = about(first)
    assert record["seed"] == 42 and record["num_frames"] == 17 and record["control"] == ",".join(["D"] * 8 + ["DL"] * 8)
    assert make(stage, "again.mp4", *call).read_bytes() == first.read_bytes()
    assert make(stage, "other.mp4", *call, "--seed", 1).read_bytes() != first.read_bytes()
    assert make(stage, "right.mp4", *call[2:], "--control", "D*8,DR*8").read_bytes() != first.read_bytes()


@pytest.mark.parametrize("stage", [3, 4])
def test_streams_by_the_frame_by_time_and_from_a_video(make, stage, tiny_world):
    narrow = ["--frames_per_group", 1, *FOUR_STEPS]
    assert len(frames(make(stage, "narrow.mp4", *narrow, "--groups", 3))) == 13
    assert len(frames(make(stage, "said.mp4", *narrow, "--control", "D*7"))) == 7  # as long as the control string
    timed = make(stage, "timed.mp4", *narrow, "--seconds", 0.75, "--fps", 8)
    assert len(frames(timed)) == 6 and VideoReader(str(timed)).get_avg_fps() == pytest.approx(8)
    started = ["--init_video", tiny_world / "videos" / "00000.mp4", *narrow, "--groups", 3]
    first, second = (make(stage, f"{i}.mp4", *started) for i in range(2))
    assert len(frames(first)) == 13 and first.read_bytes() == second.read_bytes()
    assert not np.array_equal(frames(first), frames(make(stage, "unstarted.mp4", *narrow, "--groups", 3)))


@pytest.fixture(scope="module")
def told_model(models) -> Path:
    """A stage 4 that is told its guidance scale, and was taught those from 1 to 7."""
    plain, scheduler = (load_component(models / "stage4", name) for name in ("transformer", "scheduler"))
    transformer = type(plain).from_transformer(plain, cond_proj_dim=8)
    torch.nn.init.normal_(transformer.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(0))
    scheduler.register_to_config(guidance_range=[1.0, 7.0])
    parts = {"transformer": transformer, "scheduler": scheduler}
    write_pipeline(models / "told", models / "stage4", "CogVideoXStreamingPipeline", parts)
    return models / "told"


@pytest.mark.parametrize(
    "stage, model, default, other", [(3, "stage3", 6, [8]), (4, "stage4", 1, []), (4, "told", 4, [6])]
)
def test_guidance_is_by_default_what_suits_the_model(make, models, told_model, stage, model, default, other):
    """The middle of the range that a model was taught; else none in stage 4, whose teacher had it."""
    call = ["--control", "D*9", "--num_inference_steps", 4, "--model_path", models / model]
    unasked, same, *others = (
        make(stage, f"{i}.mp4", *call, *words).read_bytes()
        for i, words in enumerate(([], *(["--guidance_scale", scale] for scale in (default, *other))))
    )
    assert unasked == same and unasked not in others


def test_contact_sheet_shows_frames_and_commanded_signals(make, monkeypatch, tmp_path, capsys):
    video = make(2, "drive.mp4", "--control", "D*4,DL*5", *TWO_STEPS)

    def sheet(name: str) -> np.ndarray:
        words = ["--columns", 3, "--frame_height", 64, f"one={video}", f"two={video}", "--output", tmp_path / name]
        monkeypatch.setattr("sys.argv", ["contact_sheet", *map(str, words)])
        contact_sheet.main()
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            return np.asarray(image).astype(int)

    signals = sheet("signals.png")
    gap, label, width = contact_sheet.GAP, contact_sheet.LABEL_WIDTH, 128
    assert signals.shape == (64 * 2 + gap, label + 3 * (width + gap) - gap, 3)
    assert "contact sheet: " in capsys.readouterr().out
    video.with_suffix(".json").unlink()
    changed = np.abs(signals - sheet("plain.png")).sum(-1) > 0
    corners = [changed[:22, label + i * (width + gap) :][:, :30] for i in range(3)]
    assert all(corner.any() for corner in corners)
    assert not np.array_equal(corners[0], corners[2])  # D, and DL
    for corner in corners:
        corner[:] = False
    assert not changed[: 64 + gap].any()  # nothing but the signals


def test_another_exact_attention_kernel_gives_the_same_video(make, monkeypatch):
    """And the text encoder, the largest part, is gone before the video is made."""
    pipelines = []
    apply = inference.speed_up
    monkeypatch.setattr(inference, "speed_up", lambda *given: pipelines.append(given[0]) or apply(*given))
    call = ["--control", "D*8,DL*9", *FOUR_STEPS]
    plain, other = (
        frames(make(4, f"{i}.mp4", *call, *words)).astype(int)
        for i, words in enumerate(([], ["--attention_backend", "_native_math"]))
    )
    assert abs(plain - other).mean() < 0.3  # H.264 turns a rounding into more, in a few pixels
    processors = [block.attn1.processor for block in pipelines[1].transformer.transformer_blocks]
    assert {processor._attention_backend for processor in processors} == {"_native_math"}
    assert [pipeline.text_encoder for pipeline in pipelines] == [None, None]


def test_a_light_decoder_makes_the_pictures_of_the_same_latents(make, models, tmp_path):
    torch.manual_seed(0)
    light = LightVideoDecoder.for_vae(
        load_component(models / "stage4", "vae"), widths=(16, 8, 8), layers=(1, 1, 1), memory_layers=(1, 1, 0)
    )
    light.save_pretrained(tmp_path / "light")
    call = ["--control", "D*17", *FOUR_STEPS]
    plain = make(4, "plain.mp4", *call, "--decode_device", "cpu")
    other = make(4, "light.mp4", *call, "--light_decoder", tmp_path / "light")
    assert about(other)["light_decoder"] == str(tmp_path / "light")
    pipeline = CogVideoXStreamingPipeline.from_pretrained(models / "stage4")
    generator = torch.Generator().manual_seed(42)
    stream = pipeline.stream("x", ["D"] * 17, num_inference_steps=4, height=32, width=64, generator=generator)
    latents = torch.cat([stream.advance() for _ in range(2)], dim=1)
    expected = LightStreamingDecoder(light).decode_uint8(latents)
    gray = [video.mean(axis=-1).ravel() for video in (expected, frames(other), frames(plain))]
    likeness = np.corrcoef(gray)[0]  # H.264 lies between, which keeps little of the colour of such noise
    assert likeness[1] > 0.8 and abs(likeness[2]) < 0.5


def test_an_error_in_mid_stream_leaves_what_was_made_to_be_watched(models, monkeypatch, tmp_path):
    """Frames of the shift before it are written too, though that one was still being decoded."""
    shift = VideoStream.shift

    def fail_at_the_third(stream):
        if stream.num_chunks_done == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return shift(stream)

    monkeypatch.setattr(VideoStream, "shift", fail_at_the_third)
    output = tmp_path / "half.mp4"
    words = ["--model_path", models / "stage4", "--prompt", "x", *SIZE, "--control", "D*40", "--output", output]
    monkeypatch.setattr("sys.argv", ["inference.py", *map(str, words)])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runpy.run_path(str(ROOT / "stage4" / "inference.py"), run_name="__main__")
    assert len(frames(output)) == 17


@pytest.mark.parametrize(
    "words, told",
    [
        (["--attention_backend", "warp"], "invalid choice: 'warp'"),
        (["--attention_backend", "sage"], "error: attention_backend sage: "),
        (["--light_decoder", "nowhere"], "no light decoder at nowhere; python -m common.tools.distill_decoder makes"),
        (["--decode_device", "cuda:9"], "error: decode_device cuda:9: "),
        (["--negative_prompt", "snow"], "--negative_prompt does nothing without guidance"),
    ],
)
def test_options_that_cannot_work_are_refused(refused, tiny_models, tmp_path, words, told):
    arguments = ["--model_path", tiny_models / "stage4", "--prompt", "a car", "--control", "D*9"]
    assert told in refused("stage4/inference.py", *arguments, "--output", tmp_path / "x.mp4", *words)
