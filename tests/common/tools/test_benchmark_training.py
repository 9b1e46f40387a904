"""The training benchmark's figures: which there are and that they fit together; not how high they are."""

import json
import math
import statistics

import pytest
import torch

from common.config.loader import load_settings
from common.tools import benchmark_training, benchmark_training_table
from common.training.random_batches import NUM_BATCHES, random_batches
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

PROGRAM = "common/tools/benchmark_training.py"
SIZE = ["--height_buckets", "32", "--width_buckets", "48", "--max_sequence_length", "16"]
BRIEF = ["--steps", "3", "--warmup", "1", "--batch_size", "2"]
STAGES = {1: ["--rank", "4"], 2: ["--control_dim", "12", "--control_start_layer", "1", "--control_end_layer", "4"]}


def words(stage: int, tiny_base, tiny_models) -> list[object]:
    base = tiny_base if stage < 3 else tiny_models / f"stage{stage - 1}"
    config = ROOT / f"stage{stage}" / "training" / "miniworld_config.py"
    return ["--config", config, "--model_path", base, *SIZE, *BRIEF, *STAGES.get(stage, [])]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_step_of_every_stage(run_program, tiny_base, tiny_models, tmp_path, stage):
    output = tmp_path / "new" / "figures.json"
    said = run_program(PROGRAM, *words(stage, tiny_base, tiny_models), "--frames", "17", "--output", output)
    (row,) = json.loads(output.read_text())["rows"]
    assert row["name"] == f"stage{stage}" and len(row["step_seconds"]) == 3 and all(row["step_seconds"])
    seconds = row["s_per_step"]
    assert seconds == statistics.median(row["step_seconds"])
    assert row["samples_per_s"] * seconds == pytest.approx(2) and row["samples_per_step"] == 2
    assert row["video_tokens_per_s"] * seconds == pytest.approx(2 * 5 * 2 * 3)  # 5 latent frames of 4×6, patches of 2
    assert row["mfu"] == pytest.approx(row["tflops_per_s"] * 1e12 / row["product"]["flops_per_s"]) and row["mfu"] > 0
    assert math.isfinite(row["loss"]) and row["loss"] > 0 and len(row["losses"]) == 1
    assert 0 < row["peak_loading_gib"] <= row["peak_allocated_gib"] < 64 and row["peak_reserved_gib"] is None
    assert 0 < row["trained_parameters"] <= row["parameters"]
    assert (row["frames"], row["height"], row["width"], row["torch"]) == (17, 32, 48, torch.__version__)
    assert row["settings"]["train_batch_size"] == 2 and row["settings"]["validation_prompts"] == []
    for shown in (f"{seconds:.4f}", f"{row['samples_per_s']:.3f}", "2 × 17×32×48", "TFLOP/s", row["device"]):
        assert shown in said


def test_runs_side_by_side_and_one_without_enough_memory(run_program, tiny_base, tiny_models, tmp_path):
    output = tmp_path / "figures.json"
    trials = ["--try", "plain:", "--try", "less: --gradient_checkpointing 2 --steps 1", "--losses", "3"]
    trials += ["--try", "huge: --batch_size 100000000"]
    said = run_program(PROGRAM, *words(3, tiny_base, tiny_models), *trials, "--output", output)
    plain, less, huge = json.loads(output.read_text())["rows"]
    assert f"less: {less['s_per_step']:.4f} s a step, {less['peak_allocated_gib']:.2f} GiB" in said
    assert [row["name"] for row in (plain, less, huge)] == ["plain", "less", "huge"]
    assert plain["settings"]["gradient_checkpointing"] is False and less["settings"]["gradient_checkpointing"] == 2
    assert len(plain["step_seconds"]) == 3 and len(less["step_seconds"]) == 1
    assert plain["losses"] == less["losses"] and len(set(plain["losses"])) == 3
    assert huge["out_of_memory"] and "lower train_batch_size (now 100000000)" in huge["error"]
    assert f"{plain['losses'][2]:>12.6f}{less['losses'][2]:>12.6f}" in said and "less: at most 0.00% from plain" in said
    assert f"median of 1 or 3 steps\n{plain['device']}, torch {torch.__version__}" in said
    table = said[said.index("s/step") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["plain", "less", "huge"]
    assert table[3].split(maxsplit=1)[1] == "out of memory"


def test_a_row_is_written_before_the_next_run_begins(monkeypatch, tiny_base, tiny_models, tmp_path):
    """What an impatient user has waited for is there."""
    output, line = tmp_path / "figures.json", [str(word) for word in words(3, tiny_base, tiny_models)]

    def run_trial(name, words):
        if name == "second":
            raise KeyboardInterrupt
        return {"name": name, "s_per_step": 1.0, "peak_allocated_gib": 2.0}

    monkeypatch.setattr(benchmark_training, "run_trial", run_trial)
    with pytest.raises(KeyboardInterrupt):
        benchmark_training.run_trials([("first", []), ("second", [])], line, output)
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == ["first"]


def test_a_recorded_step_has_the_losses_of_a_plain_one(run_program, tiny_base, tiny_models, tmp_path):
    found = []
    for option in ([], ["--cuda_graph"]):
        output = tmp_path / "figures.json"
        run_program(PROGRAM, *words(2, tiny_base, tiny_models), *option, "--losses", "6", "--output", output)
        found.append(json.loads(output.read_text())["rows"][0]["losses"])
    assert found[0] == found[1]


def test_random_batches_are_the_same_for_any_number_of_processes(tiny_models):
    config = ROOT / "stage3" / "training" / "miniworld_config.py"
    base = ["--pretrained_model_name_or_path", str(tiny_models / "stage2"), *SIZE, "--train_batch_size"]
    one, two = load_settings(config, [*base, "1"]), load_settings(config, [*base, "2"])
    whole, parts = random_batches(two, True), [random_batches(one, True, 2, rank) for rank in (0, 1)]
    for _ in range(NUM_BATCHES + 1):
        expected, halves = next(whole), [next(part) for part in parts]
        for name in ("latent_moments", "prompt_embeds", "control_indices", "slots"):
            assert torch.equal(expected[name], torch.cat([half[name] for half in halves]))
        assert expected["sample_ids"] == [name for half in halves for name in half["sample_ids"]]
    later = next(random_batches(two, True, start_step=NUM_BATCHES))  # as after a resumption: the first comes again
    assert torch.equal(later["latent_moments"], expected["latent_moments"])
    assert expected["latent_moments"].shape == (2, 9, 32, 4, 6)
    assert "control_indices" not in next(random_batches(two, False))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--output", "figures.txt"], "ends in .json"),
        (["--steps", "0"], "1 or more"),
        (["--frames", "34"], "34 frames is not 4n+1; use 33 or 37"),
        (["--stepss", "3"], "--stepss: no such setting"),
        (["--try", "compiled"], "write a name, a colon, and settings"),
        (["--try", "a:", "--try", "a: --compile"], "the same name"),
        (["--try", "a: --learning_rat 1"], "did you mean learning_rate"),
    ],
)
def test_wrong_options_are_refused(refused, tiny_base, tiny_models, more, told):
    assert told in refused(benchmark_training.main, *words(3, tiny_base, tiny_models), *more)


def test_a_run_that_fails_otherwise_is_a_row_and_the_exit_code(capfd, monkeypatch, tiny_base, tiny_models, tmp_path):
    line = [
        *words(3, tiny_base, tiny_models),
        "--output",
        tmp_path / "x.json",
        "--try",
        "nowhere: --model_path /no/where",
    ]
    monkeypatch.setattr("sys.argv", ["program", *map(str, line)])
    assert benchmark_training.main() == 1
    assert "/no/where" in capfd.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 3}', '{"rows": []}', '{"rows": [{}]}'])
def test_files_that_hold_no_rows_are_no_table(refused, tmp_path, content):
    path = tmp_path / "row.json"
    path.write_text(content)
    assert f"{path}: no JSON that common.tools.benchmark_training wrote" in refused(benchmark_training_table.main, path)
    path.unlink()
    assert f"{path}: no JSON" in refused(benchmark_training_table.main, path)
