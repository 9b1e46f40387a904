"""Samples and batches from real files: windows, labels, bad clips, processes, workers."""

import json
import logging
import multiprocessing
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch
from barcode import frame_number, frame_numbers, write_video

from common.config.errors import UserError
from common.config.settings import TrainingSettings
from common.data.control_signals import CONTROL_TOKENS
from common.data.dataset import VideoDataset, window_start
from common.data.index import read_index
from common.data.loader import build_train_loader, build_validation_batch, describe_data, read_records
from common.data.video import Video

NUM_FRAMES = {"16": 60, "30000/1001": 110, "60": 200}


def label(clip: int, frame: int) -> str:
    """A token for every raw frame that says which clip and which frame it belongs to, as far as nine tokens can."""
    return CONTROL_TOKENS[(clip + frame // 3) % 9]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine sound clips at three rates, one truncated, one missing, one too short."""
    root = tmp_path_factory.mktemp("data")
    entries = []
    for clip in range(9):
        rate = list(NUM_FRAMES)[clip % 3]
        name, count = f"videos/clip_{clip}.mp4", NUM_FRAMES[rate]
        write_video(root / name, count, rate)
        labels = ",".join(label(clip, frame) for frame in range(count))
        entries.append(
            {"path": name, "caption": f"Clip {clip}.", "control_signal_seq": labels, "valid_frame_idx": clip}
        )
    good = list(entries)
    (root / "videos/cut.mp4").write_bytes((root / "videos/clip_0.mp4").read_bytes()[:2000])
    write_video(root / "videos/short.mp4", 20, 16)
    bad = [
        {"path": f"videos/{n}.mp4", "caption": n, "control_signal_seq": "D"} for n in ("cut", "gone", "short")
    ]  # fmt: skip
    for file, chosen in (("good", good), ("bad", good + bad), ("short", good[:1] + [bad[2]] * 3)):
        (root / f"{file}.json").write_text(json.dumps({"list": chosen}))
    return root


def settings(data, index="good", **changes) -> TrainingSettings:
    values = {
        "data_root": str(data), "index_file": str(data / f"{index}.json"), "num_validation_clips": 0,
        "height_buckets": [64], "width_buckets": [96], "frame_buckets": [17], "dataloader_num_workers": 0,
        "train_batch_size": 2,
    }  # fmt: skip
    args = TrainingSettings(**(values | changes))
    args.validate()
    return args


def batches(args, count, needs_control=True, **where):
    return list(islice(build_train_loader(args, needs_control, **where), count))


def all_same(run, other) -> bool:
    return all(same(a, b) for a, b in zip(run, other, strict=True))


def same(a, b) -> bool:
    return set(a) == set(b) and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    )


def test_batch_has_the_promised_shapes(data):
    (batch,) = batches(settings(data), 1)
    assert set(batch) == {"pixel_values", "captions", "control_indices", "sample_ids", "slots"}
    assert batch["pixel_values"].shape == (2, 17, 3, 64, 96) and batch["pixel_values"].dtype == torch.uint8
    assert batch["control_indices"].shape == (2, 5, 4) and batch["control_indices"].dtype == torch.int64
    assert batch["slots"].tolist() == [0, 1]
    assert "control_indices" not in batches(settings(data), 1, needs_control=False)[0]


def test_picture_caption_and_label_belong_together(data):
    """The barcode tells the source frame of every picture; latent frame j has the labels of pictures 4j − 3 … 4j."""
    starts = set()
    for batch in batches(settings(data), 20):
        for row, sample_id in enumerate(batch["sample_ids"]):
            clip = int(sample_id.split("_")[1].split(".")[0])
            assert batch["captions"][row] == f"Clip {clip}."
            shown = frame_numbers(batch["pixel_values"][row])
            assert shown[0] >= clip, "begins before valid_frame_idx"
            assert sample_id == f"videos/clip_{clip}.mp4@{shown[0]}"
            wanted = [label(clip, frame) for frame in [shown[0]] * 3 + list(shown)]
            assert [CONTROL_TOKENS[i] for i in batch["control_indices"][row].flatten()] == wanted
            starts.add((clip, shown[0]))
    assert len(starts) > 30, "windows do not vary"
    assert len({clip for clip, _ in starts}) == 9


def test_all_starts_of_a_clip_come_up_and_none_outside(data):
    starts = Counter(window_start(3, 12, "a", 17, draw, 0, 0) for draw in range(1000))
    assert set(starts) == set(range(3, 13)) and min(starts.values()) > 50
    assert {window_start(3, 3, "a", 17, draw, 0, 0) for draw in range(9)} == {3}


def test_windows_depend_on_seed_clip_and_draw():
    def starts(clip="a", seed=0, frames=17):
        return [window_start(0, 500, clip, frames, draw, seed, 0) for draw in range(20)]

    assert starts() == starts()
    assert len({tuple(s) for s in (starts(), starts("b"), starts(seed=1), starts(frames=33))}) == 4


@pytest.mark.parametrize("count", [1, 3, 4, 50])
def test_fixed_windows_are_spread_over_the_clip_and_ignore_the_seed(count):
    starts = [window_start(10, 9 + count, "a", 17, draw, 1, 4) for draw in range(8)]
    assert starts[:4] == starts[4:] == [window_start(10, 9 + count, "a", 17, draw, 2, 4) for draw in range(4)]
    assert all(10 <= s <= 9 + count for s in starts) and starts[:4] == sorted(starts[:4])
    if count >= 4:
        assert len(set(starts)) == 4


def test_runs_repeat_resume_and_differ_by_seed(data):
    run = batches(settings(data), 6)
    assert all_same(run, batches(settings(data), 6))
    assert all_same(run[3:], batches(settings(data), 3, start_step=3))
    assert not same(run[0], batches(settings(data, seed=1), 1)[0])


def test_two_processes_draw_what_one_draws_and_never_the_same(data):
    whole = batches(settings(data, train_batch_size=2), 5)
    ranks = [batches(settings(data, train_batch_size=1), 5, world_size=2, rank=rank) for rank in range(2)]
    for step in range(5):
        for rank in range(2):
            part = ranks[rank][step]
            assert torch.equal(part["pixel_values"][0], whole[step]["pixel_values"][rank])
            assert part["slots"].tolist() == [rank]
            assert part["sample_ids"] == [whole[step]["sample_ids"][rank]]
        assert ranks[0][step]["sample_ids"] != ranks[1][step]["sample_ids"]


def test_workers_change_nothing(data):
    alone = batches(settings(data), 4)
    assert all_same(alone, batches(settings(data, dataloader_num_workers=2), 4))


def test_a_program_that_breaks_off_does_not_hang_on_its_workers(data):
    code = (
        "import sys, signal\nfrom common.config.settings import TrainingSettings\n"
        "from common.data.loader import build_train_loader\n"
        f"args = TrainingSettings(**{settings(data, dataloader_num_workers=1).to_dict()!r})\n"
        "batches = iter(build_train_loader(args, False))\nnext(batches)\n"
        "import multiprocessing, subprocess\n(worker,) = multiprocessing.active_children()\n"
        # SIGTERM from another process than the trainer, as when the whole process group is told to end.
        "subprocess.run(['kill', '-TERM', str(worker.pid)])\n"
        "for _ in range(8): next(batches)\n"  # the trainer still needs batches to end its step
        "print('served')\nraise KeyError('bug')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and run.stdout == "served\n" and "KeyError" in run.stderr


def test_buckets_of_several_lengths_and_sizes(data):
    args = settings(data, frame_buckets=[5, 17], height_buckets=[32, 64], train_batch_size=3)
    shapes = Counter(tuple(batch["pixel_values"].shape) for batch in batches(args, 8))
    assert shapes == {(3, n, 3, h, 96): 2 for n in (5, 17) for h in (32, 64)}


def test_bad_clips_are_named_once_counted_and_replaced(data, caplog):
    args = settings(data, "bad", max_unreadable_share=0.9, frame_buckets=[25])
    with caplog.at_level(logging.WARNING):
        loader = build_train_loader(args, True)
        run = list(islice(loader, 24))
    for name, entry in (("cut", 10), ("gone", 11), ("short", 12)):
        lines = [r.message for r in caplog.records if f"{name}.mp4" in r.message]
        assert len(lines) == 1 and f"index entry {entry}, another clip takes its place: " in lines[0]
    ids = [i for batch in run for i in batch["sample_ids"]]
    assert not any(word in i for i in ids for word in ("cut", "gone", "short"))
    assert loader.dataset.dataset.counts() == (2, 12)
    # What takes a bad clip's place is a function of the step too, whatever was met before.
    assert same(batches(args, 1, start_step=20)[0], run[20])
    assert all_same(batches(args, 24), run)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_large_a_share_of_unreadable_clips_stops_the_run(data, workers):
    with pytest.raises(UserError) as error:
        batches(settings(data, "bad", dataloader_num_workers=workers), 30)
    assert not multiprocessing.active_children()
    message = str(error.value)
    assert "\n" not in message and "videos seen cannot be read, more than max_unreadable_share 0.01" in message
    assert "cut.mp4" in message or "gone.mp4" in message


def test_short_clips_are_left_out_and_never_stretched(data):
    """Of the four entries only clip_0 is long enough: short.mp4 has 20 frames at 16 fps."""
    for batch in batches(settings(data, "short", frame_buckets=[33], max_unreadable_share=0.0), 3):
        assert all(sample.startswith("videos/clip_0") for sample in batch["sample_ids"])
    with pytest.raises(UserError, match=r"frame_buckets: found no clip for 65 frames at 16 fps .4.00 s."):
        batches(settings(data, "short", frame_buckets=[65]), 1)


def test_frames_needed_are_counted_at_the_models_rate(data):
    """200 frames at 60 fps are 3.3 s: enough for 49 frames at 16 fps, not for 57; 110 at 29.97 are 3.7 s."""
    records = read_index(data / "good.json", data, False)
    dataset = VideoDataset(records, [], fps=16)
    assert dataset.fps == 16
    assert Video(records[2].path).last_start(0, 49, 16) >= 0
    args = settings(data, frame_buckets=[57], train_batch_size=1)
    ids = {i for batch in batches(args, 18) for i in batch["sample_ids"]}
    assert {int(i.split("_")[1].split(".")[0]) % 3 for i in ids} <= {0, 1}


def test_more_samples_than_clips(data):
    with pytest.raises(UserError, match="train_batch_size: 5 on 2 processes needs 10 clips"):
        build_train_loader(settings(data, train_batch_size=5), False, world_size=2)


def test_held_out_clips_are_never_trained_on(data):
    args = settings(data, num_validation_clips=3)
    held_out = {r.name for r in read_records(args, False)[1]}
    assert held_out == {f"videos/clip_{n}.mp4" for n in (6, 7, 8)}
    trained = {i.split("@")[0] for batch in batches(args, 12) for i in batch["sample_ids"]}
    assert len(trained) == 6 and not trained & held_out
    with pytest.raises(UserError, match="num_validation_clips: 9 clips are to be held out, but .* has only 9"):
        read_records(settings(data, num_validation_clips=9), False)


def test_the_validation_batch_is_fixed(data):
    args = settings(data, num_validation_clips=3)
    batch = build_validation_batch(args, True)
    assert batch["pixel_values"].shape == (3, 17, 3, 64, 96) and batch["slots"].tolist() == [0, 1, 2]
    assert batch["captions"] == ["Clip 6.", "Clip 7.", "Clip 8."]
    assert same(batch, build_validation_batch(settings(data, num_validation_clips=3, seed=9), True))
    assert build_validation_batch(settings(data), True) is None


def test_validation_from_its_own_index(data):
    args = settings(data, num_validation_clips=2, validation_index_file=str(data / "bad.json"))
    assert len(read_records(args, True)[0]) == 9
    assert build_validation_batch(args, True)["captions"] == ["Clip 0.", "Clip 1."]
    only_bad = data / "only_bad.json"
    only_bad.write_text(json.dumps({"list": [{"path": "videos/short.mp4", "caption": "x"}]}))
    with pytest.raises(UserError, match="none of the 1 held-out clips can be used for 33x64x96"):
        args = settings(data, num_validation_clips=2, validation_index_file=str(only_bad), frame_buckets=[33])
        build_validation_batch(args, False)


def test_describe_data(data):
    args = settings(data, num_validation_clips=1, frame_buckets=[5, 17], gradient_accumulation_steps=2)
    assert describe_data(args, True, world_size=2) == {
        "training_clips": 8, "validation_clips": 1, "buckets": ["5x64x96", "17x64x96"],
        "clips_per_optimizer_step": 8, "optimizer_steps_per_epoch": 1.0,
    }  # fmt: skip


def test_no_flips(data):
    """A mirrored picture would need its left and right labels swapped. The barcode reads backwards in a mirror."""
    for batch in batches(settings(data), 10):
        for row, sample_id in enumerate(batch["sample_ids"]):
            assert frame_number(batch["pixel_values"][row, 0]) == int(sample_id.split("@")[1])
