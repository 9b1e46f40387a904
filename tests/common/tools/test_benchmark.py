"""The benchmark's figures: which there are and that they fit together; not how high they are."""

import json

import pytest

from common.tools import benchmark

PARTS = ("transformer", "vae", "transfer")


@pytest.mark.parametrize("stage, words, forwards", [(4, [], 1), (3, ["--num_inference_steps", "8"], 2)])
def test_benchmark_of_a_streaming_model(run_program, tiny_models, tmp_path, stage, words, forwards):
    output = tmp_path / "new" / "figures.json"
    brief = ["--seconds", "0.01", "--warmup", "1", "--threads", "1", "--device", "cpu", "--batch_size", "2"]
    said = run_program(
        "common/tools/benchmark.py", "--model_path", tiny_models / f"stage{stage}", *brief, *words, "--output", output
    )
    figures = json.loads(output.read_text())
    assert figures["forwards_per_chunk"] == forwards and figures["chunks"] >= 2 and figures["streams"] == 2
    assert (figures["height"], figures["width"], figures["frames_per_chunk"]) == (32, 48, 8)
    assert figures["first_chunk"]["frames"] == 9 and figures["threads"] == 1 and figures["dtype"] == "float32"
    for column in ("median", "p99", "first_chunk"):
        assert all(figures[column][part] > 0 for part in PARTS)
    assert sum(figures["first_chunk"][part] for part in PARTS) <= figures["first_chunk"]["chunk"] * 1.01
    assert figures["median"]["chunk"] <= figures["p99"]["chunk"] and figures["peak_memory_gib"] > 0
    assert 0 < figures["interval"]["median"] <= figures["interval"]["p99"] and figures["ready_s"] > 0
    assert f"2 × {figures['fps']:.1f} frames a second of 48×32" in said


def test_ablation_adds_one_change_after_the_other(run_program, tiny_models, tmp_path, traced):
    """In bfloat16."""
    output = tmp_path / "figures.json"
    brief = ["--seconds", "0.01", "--warmup", "1", "--device", "cpu", "--dtype", "bfloat16", "--ablation"]
    said = run_program("common/tools/benchmark.py", "--model_path", tiny_models / "stage4", *brief, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [row["change"] for row in rows] == ["eager", *(f"+ {name}" for name in benchmark.CHANGES)]
    errors = [row["error"]["transformer"] for row in rows]
    assert 0 < errors[0] < 0.02 and errors[0] == pytest.approx(errors[1], rel=0.5)  # bfloat16, eager and compiled
    assert 1.2 * errors[1] < errors[-1] < 0.1  # float8
    assert all(0 < row["error"]["pixels"] < 0.05 and row["fps"] > 0 for row in rows)
    assert all(row["change"] in said for row in rows)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--output", "figures.txt"], "ends in .json"),
        (["--seconds", "0"], "more than 0"),
        (["--threads", "0"], "1 or more"),
        (["--guidance_scale", "3"], "guidance_scale 3: the model learnt its guidance"),
    ],
)
def test_wrong_options_are_refused(refused, tiny_models, words, told):
    assert told in refused(benchmark.main, "--model_path", tiny_models / "stage4", *words)


def test_a_model_that_does_not_stream_is_refused(refused, tiny_models):
    assert "a streaming pipeline (stage 3 or 4)" in refused(benchmark.main, "--model_path", tiny_models / "stage2")
