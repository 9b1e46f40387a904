"""The evaluation program: a complete report from tiny models, resuming, merging, and what it says of true video."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from common.config.errors import UserError
from common.data.video import Video
from common.evaluation.comparison import make_report
from common.evaluation.parts import Part, PartKey, PartStore
from common.evaluation.summary import control_summary, frechet_summary
from common.tools import evaluate
from common.tools.evaluate_measures import latency_values, values_of
from common.tools.evaluate_models import LiveCommands, Model, generators_for, plan_model
from data.miniworld.heldout import LEAD_IN, SceneSet, draw_scenes
from data.miniworld.simulator import SIGNALS

pytestmark = pytest.mark.slow

BRIEF = "--num_videos 2 --num_frames 17 --stream_seconds 3 --minutes 0.17 --num_streams 2 --reference_drives 1"
WORDS = [*BRIEF.split(), "--device", "cpu", "--seeds", "0"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_base, tiny_models):
    """Folder of a report on a base model and on stage 4. Read only."""
    output = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    paths = ["--model_path", tiny_base, str(tiny_models / "stage4"), "--name", "base", "stage 4"]
    patch.setattr(sys, "argv", ["evaluate", "--output_dir", str(output), *paths, *WORDS, "--frames_per_group", "1"])
    evaluate.main()
    patch.undo()
    return output


def run_again(monkeypatch, output, *words):
    """A further start, without the plots, which take longest; → report.json."""
    monkeypatch.setattr("common.evaluation.report.write_plots", lambda folder, report: {})
    monkeypatch.setattr(sys, "argv", ["evaluate", "--output_dir", str(output), *map(str, words)])
    evaluate.main()
    return json.loads((output / "report.json").read_text())


def test_report_is_complete(evaluated):
    report = json.loads((evaluated / "report.json").read_text())
    assert report["version"] == 1 and report["signals"] == list(SIGNALS)
    rows = {row["name"]: row for row in report["rows"]}
    assert [row["kind"] for row in report["rows"]] == ["true", "vae", "model", "model"]
    assert set(rows["base"]["measures"]) == {"control", "frechet", "text"}
    assert set(rows["stage 4"]["measures"]) == {"control", "frechet", "text", "latency", "drift"}
    assert set(rows["stage 4"]["measures"]["latency"]) == {"w1", "w2"}
    assert set(rows["stage 4"]["measures"]["drift"]) == {"mixed", "straight"}
    assert set(rows["true"]["measures"]["control"]) == {"clips", "streams"}
    for row in report["rows"]:
        for variant, summary in row["measures"]["control"].items():
            value, low, high = summary["macro_f1"]
            assert 0 <= low <= value <= high <= 1 and summary["seeds"] == [0]
            counts = np.array(summary["confusion"])
            assert counts.shape == (9, 9) and counts.sum() == 2 * (4 if variant == "clips" else 12)
            assert ("share_of_ceiling" in summary) == (row["kind"] == "model")
        for summary in row["measures"]["frechet"].values():
            assert summary["distance"][0] >= 0 and summary["floor"] >= 0
    # One forward a shift of eight frames; a clip takes twenty.
    assert rows["stage 4"]["speed"]["forwards"] == 1 and rows["stage 4"]["speed"]["forwards_per_frames"] == 8
    assert rows["base"]["speed"]["forwards"] == 20 and rows["base"]["speed"]["forwards_per_frames"] == 17
    assert rows["base"]["speed"]["seconds_per_frame"] > 0


def test_report_to_read_and_plots(evaluated):
    text = (evaluated / "report.md").read_text()
    for title in ("## Control", "## Fréchet distance", "## Text", "## Latency", "## Drift", "## How it was made"):
        assert title in text
    plots = {path.name for path in evaluated.glob("*.png")}
    assert {"control.png", "confusion.png", "frechet.png", "drift_mixed.png", "drift_straight.png"} <= plots
    assert all(f"]({name})" in text for name in plots)
    assert {"samples_clips.png", "samples_streams.png"} <= plots
    for name, frames in (("base.clips", 17), ("stage 4.streams", 81), ("true.streams", 81)):
        video = evaluated / "videos" / f"{name}.1.mp4"
        about = json.loads(video.with_suffix(".json").read_text())
        assert len(Video(video)) == frames == len(about["control"].split(",")) and about["prompt"]
    assert str(evaluated) not in text and str(evaluated) not in (evaluated / "report.json").read_text()


def test_a_second_start_makes_nothing_twice(evaluated, tiny_base, tmp_path, monkeypatch):
    output = tmp_path / "report"
    shutil.copytree(evaluated, output)
    first = json.loads((output / "report.json").read_text())
    arguments = ["--model_path", tiny_base, "--name", "base", *WORDS]
    with monkeypatch.context() as patch:
        patch.setattr(Model, "clips", None)
        patch.setattr("common.tools.evaluate_run.draw_scenes", None)
        assert run_again(patch, output, *arguments) == first
    (output / "parts" / "base.text.clips.seed0.json").unlink()
    (output / "parts" / "base.control.clips.seed0.json").write_text("{")
    with pytest.raises(UserError, match="is not a part"):
        run_again(monkeypatch, output, *arguments)
    (output / "parts" / "base.control.clips.seed0.json").unlink()
    again = {row["name"]: row["measures"] for row in run_again(monkeypatch, output, *arguments)["rows"]}
    assert again == {row["name"]: row["measures"] for row in first["rows"]}  # the same numbers, drawn anew


def test_other_settings_are_not_mixed_in(evaluated, tiny_base, monkeypatch):
    words = [*WORDS, "--num_inference_steps", "3"]
    with pytest.raises(UserError, match="num_inference_steps 20, now it is 3: take another --name"):
        run_again(monkeypatch, evaluated, "--model_path", tiny_base, "--name", "base", *words)


def test_a_part_knows_every_component_of_its_model(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--output_dir", "none", "--device", "cpu"])
    args = evaluate.parse_arguments()
    model = tmp_path / "model"
    shutil.copytree(tiny_models / "stage3", model)

    def changed_by(file, **values):
        """Names of the settings that differ once a JSON file of the model says something else."""
        before = plan_model(str(model), "m", args).settings
        text = (model / file).read_text()
        (model / file).write_text(json.dumps(json.loads(text) | values))
        after = plan_model(str(model), "m", args).settings
        (model / file).write_text(text)
        return [name for name in after if after[name] != before[name]]

    scheduler = "scheduler/scheduler_config.json"
    other_class = ["common.cogvideox.scheduler", "CogVideoXSwinDDIMScheduler"]
    assert changed_by(scheduler, condition_timestep=20) == ["scheduler"]
    assert changed_by(scheduler, frames_per_group=1) == ["scheduler"]
    assert changed_by(scheduler, num_noise_groups=8) == ["scheduler", "num_inference_steps"]  # 24, which 8 divides
    assert changed_by("model_index.json", scheduler=other_class) == ["scheduler"]
    assert changed_by("control_vocabulary/vocabulary.json", label="last") == ["control_vocabulary"]
    assert changed_by("text_encoder/config.json", dense_act_fn="gelu") == ["text_encoder"]
    assert changed_by("tokenizer/tokenizer_config.json", model_max_length=8) == ["tokenizer"]
    assert changed_by(scheduler, _diffusers_version="9") == []  # the same, written anew


def test_parts_of_two_machines_make_one_report(evaluated, tmp_path, monkeypatch):
    for part in (evaluated / "parts").iterdir():
        (tmp_path / "parts").mkdir(exist_ok=True)
        shutil.copy(part, tmp_path / "parts")
    merged = run_again(monkeypatch, tmp_path)
    assert merged == json.loads((evaluated / "report.json").read_text())


def test_true_video_reaches_the_top():
    scenes = SceneSet(0, 0, 4, 65).scenes()
    frames = draw_scenes(scenes, 64, 96)
    control = control_summary([values_of("control", None, frames, scenes)], len(SIGNALS))
    assert control["macro_f1"][0] >= 0.95
    assert control["position_share"][0] < 0.05 and control["heading_share"][0] < 0.1
    cropped = values_of("control", None, frames, scenes, skip=LEAD_IN)
    assert np.mean(np.array(cropped["true"]) == np.array(cropped["obeyed"])) >= 0.95
    live = SceneSet(0, 0, 2, 161, "live").scenes()
    answers = latency_values(draw_scenes(live, 64, 96), live)["frames"]
    assert len(answers) >= 4 and np.nanmedian(answers) <= 3


def test_scenes_are_the_same_each_time_and_differ_from_one_another():
    short, long = SceneSet(0, 1, 3, 33), SceneSet(0, 1, 3, 65)
    assert short.scenes() == short.scenes()
    for one, other in zip(short.scenes(), long.scenes(), strict=True):
        assert one.caption == other.caption and one.signals == other.signals[:33] and one.start == other.start
    assert len({scene.start for set_ in (short, SceneSet(0, 2, 3, 33), SceneSet(1, 1, 3, 33))
                for scene in set_.scenes()}) == 9  # fmt: skip
    reference = short.other_scenes(2)
    assert [scene.caption for scene in reference] == [s.caption for s in short.scenes() for _ in range(2)]
    assert len({scene.look.seed for scene in [*reference, *short.scenes()]}) == 9
    assert set(SceneSet(0, 0, 2, 33, "straight").scenes()[0].signals) == {"D"}


def test_live_commands_know_nothing_of_the_future():
    signals = [["D"] * 10 + ["DL"] * 20]
    live, asked = LiveCommands(signals), []
    for num_frames in (9, 8, 8):
        asked.append(live.controls[0]())
        live.took(num_frames)
    assert asked == ["D", "D", "DL"]  # the press at frame 10 is heard when frame 17 is due
    assert live.delivered == [["D"] * 3 + ["D"] * 2 + ["DL"] * 2]


def test_videos_do_not_depend_on_the_batch(tiny_models, monkeypatch):
    words = ["evaluate", "--output_dir", "none", "--num_inference_steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    args = evaluate.parse_arguments()
    model = Model(plan_model(str(tiny_models / "stage2"), "m", args), args)
    scenes = SceneSet(0, 0, 2, 17).scenes()
    given = []
    handed_on = model.pipeline._clip_control
    monkeypatch.setattr(model.pipeline, "_clip_control", lambda *a: given.append(handed_on(*a)) or given[-1])
    both = model.clips(scenes, generators_for(0, 0, 2))
    alone = model.clips(scenes[1:], generators_for(0, 1, 1))
    assert both.shape == (2, 17, 32, 48, 3) and both.dtype == torch.uint8
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    assert given[0] == [[[SIGNALS.index(signal)] * 4 for signal in scene.signals[::4]] for scene in scenes]


def test_intervals_and_pairs():
    right, wrong = {"true": [[0, 1, 2]] * 8, "obeyed": [[0, 1, 2]] * 8}, {"true": [[0, 1, 2]] * 8}
    wrong["obeyed"] = [[0, 1, 2]] * 4 + [[1, 2, 0]] * 4
    for values in (right, wrong):
        values |= {"position_share": [0.1] * 8, "heading_share": [0.2] * 8}
    summary = control_summary([wrong], 9, ceiling=[right])
    late = {**right, "true": [[0, 0, 1, 1, 2]] * 8, "obeyed": [[0, 0, 0, 1, 1]] * 6 + [[0, 3, 1, 1, 2]] * 2}
    assert control_summary([late], 9)["wrong"] == {"after_change": 12 / 16, "elsewhere": 2 / 24}
    assert summary["macro_f1"][0] == pytest.approx(0.5) and summary["share_of_ceiling"][0] == pytest.approx(0.5)
    assert 0.1 < summary["macro_f1"][1] < 0.4 and 0.6 < summary["macro_f1"][2] < 0.9
    with pytest.raises(ValueError, match="other scenes"):
        control_summary([wrong], 9, ceiling=[right | {"true": [[0, 0, 0]] * 8}])
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(12, 2, 4, generator=generator), 3 + torch.randn(12, 2, 4, generator=generator)
    reference = {"features": torch.randn(24, 2, 4, generator=generator).tolist()}
    close, away = (frechet_summary([{"features": f.tolist()}], [reference], None)["distance"] for f in (near, far))
    assert close[2] < away[1] and away[0] == pytest.approx(36, rel=0.3)


def test_a_row_without_its_reference_is_left_out(tmp_path):
    store = PartStore(tmp_path)
    store.save(Part(PartKey("m", "frechet", "clips", 0), "model", {"vae": "x"}, {}, {"features": [[[float("nan")]]]}))
    report = make_report(store.all(), SIGNALS)
    assert report["rows"][0]["measures"] == {}


@pytest.mark.parametrize(
    "changed, told",
    [({"weights": "new"}, "weights old, .*seed1.json with new"), ({"num_videos": 4}, "num_videos 2, .* with 4")],
)
def test_a_row_is_of_one_model_sampled_alike(changed, told):
    settings = {"weights": "old", "num_videos": 2}
    parts = [
        Part(PartKey("m", "control", "streams", seed), "model", settings | more, {}, {})
        for seed, more in ((0, {}), (1, changed))
    ]
    with pytest.raises(UserError, match=told):
        make_report(parts, SIGNALS)


MISTAKES = [
    (["--num_frames", "32"], "32 does not fit; use 29 or 33"),
    (["--num_videos", "1"], "1 is too small; use 2 or more"),
    (["--measures", "fid"], "invalid choice: 'fid'"),
    (["--name", "a", "b"], "--name has 2 labels for 1 models"),
    (["--name", "true"], "what the report calls its own rows"),
    (["--name", "a/b"], "use letters, digits"),
    (["--seeds", "1", "1"], "a seed occurs twice"),
    (["--minutes", "0.1"], "drift is measured by segments of 10 s"),
    (["--stream_seconds", "1"], "give 3 or more"),
    (["--device", "cuda:77"], "--device cuda:77: "),
    (["--output_dir", "/dev/null/report"], "cannot be written"),
    (["--num_inference_steps", "6"], "6 inference steps do not divide among 4 noise groups"),
]


@pytest.mark.parametrize("words, told", MISTAKES)
def test_wrong_options_are_refused(refused, tiny_models, tmp_path, words, told):
    output = ["--output_dir", tmp_path / "new"]
    assert told in refused(evaluate.main, *output, "--model_path", tiny_models / "stage3", *words)
    assert not (tmp_path / "new").exists()


def test_wrong_models_are_refused(refused, tiny_models, tiny_lora, tmp_path):
    output, two = ["--output_dir", tmp_path / "new"], tiny_models / "stage2"
    assert "two models are called stage2" in refused(evaluate.main, *output, "--model_path", two, two)
    assert "holds a LoRA, not a pipeline" in refused(evaluate.main, *output, "--model_path", tiny_lora)
    assert "no model directory at" in refused(evaluate.main, *output, "--model_path", tmp_path / "none")
    assert "no --model_path says what to measure" in refused(evaluate.main, *output)


def test_a_row_is_called_as_its_directory_whatever_that_is(monkeypatch, tmp_path):
    paths = ["models/CogVideoX1.5-5B", "outputs/my stage 4/", str(tmp_path / "checkpoint-20")]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--output_dir", "report", "--model_path", *paths])
    assert evaluate.row_names(evaluate.parse_arguments()) == ["CogVideoX1-5-5B", "my-stage-4", "checkpoint-20"]
