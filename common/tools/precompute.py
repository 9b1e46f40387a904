"""Encode a run's videos and captions once, so that training reads latents instead of decoding and encoding.

    python -m common.tools.precompute --config stage2/training/sft_config.py --latent_cache_dir cache
    --windows_per_clip 4

Takes a training config and its overrides; `latent_cache_dir` and `windows_per_clip` must be set. `--dry_run`
says how much belongs into it; `--renew` first deletes what it holds, such as what other settings or weights made.
Interrupted, it goes on when started again. On several GPUs: `torchrun --nproc_per_node 8 -m common.tools.precompute …`;
every process takes its share, and the first one's progress is shown. More processes than GPUs share them.

At 480×720 a window of 33 frames takes about 0.7 s on an H200 and 3 MB in bf16; a caption 1.9 MB.
"""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.cogvideox.pipeline_io import load_component
from common.config.command_line import refuse_unwritable
from common.config.errors import SettingError, UserError, run_cli
from common.config.loader import load_settings, parse_launch_line
from common.config.model_directory import resolve_pipeline_directory
from common.config.settings import TrainingSettings
from common.data.buckets import make_buckets
from common.data.dataset import VideoDataset
from common.data.fingerprint import VideoStamp, cache_fingerprint
from common.data.index import ClipRecord
from common.data.latent_cache import LatentCacheWriter, clear_cache
from common.data.loader import read_records
from common.data.video import ClipError
from common.training.accelerator import compute_dtype
from common.training.encoding import encode_moments, encode_prompts

OUT_OF_MEMORY_HELP = "out of memory: lower frame_buckets, height_buckets/width_buckets or dataloader_num_workers"


Item = TypeVar("Item")


class Share(NamedTuple):
    """Which of several processes this is: each takes every `count`-th clip and caption."""

    number: int
    count: int

    @classmethod
    def of_this_process(cls) -> "Share":
        """By what a launcher has set in the environment; without one, all of it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def __str__(self) -> str:
        return f" (share {self.number + 1} of {self.count})" if self.count > 1 else ""

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items."""
        return items[self.number :: self.count]

    def progress(self, items: Iterable[Item], what: str) -> Iterable[Item]:
        """`items`, with a progress bar in the first process: shares are alike, and bars would overwrite each other."""
        return tqdm(items, desc=f"{what}{self}", disable=self.number > 0 or not len(items))


class Task(NamedTuple):
    """One window to encode; the numbers are places in the data set's lists."""

    record: int
    bucket: int
    window: int


class _Windows(Dataset):
    """Decodes tasks; a clip that cannot be used comes back as its error."""

    def __init__(self, videos: VideoDataset, tasks: list[Task]):
        self.videos, self.tasks = videos, tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> tuple[Task, VideoStamp | None, dict[str, Any] | ClipError]:
        task = self.tasks[number]
        record, bucket = self.videos.records[task.record], self.videos.buckets[task.bucket]
        stamp = VideoStamp.of(record.path)
        try:
            return task, stamp, self.videos.fetch(record, bucket, task.window)
        except ClipError as error:
            return task, stamp, type(error)(str(error))  # without its traceback, which cannot leave the process


def video_dataset(settings: TrainingSettings, records: list[ClipRecord]) -> VideoDataset:
    """The data set that on-the-fly training would read its windows from."""
    buckets = make_buckets(settings.frame_buckets, settings.height_buckets, settings.width_buckets)
    return VideoDataset(
        records, buckets, fps=settings.fps, windows_per_clip=settings.windows_per_clip,
        max_unreadable_share=settings.max_unreadable_share,
    )  # fmt: skip


def missing_tasks(
    writer: LatentCacheWriter, videos: VideoDataset, num_buckets: int, num_windows: int, share: Share
) -> list[Task]:
    """This process's windows of the first `num_buckets` buckets that the cache lacks; clips of which it has some
    are noted as usable. Whole clips are divided among the processes, not what is missing: that changes while the
    others write."""
    tasks = []
    for task in (
        Task(record, bucket, window)
        for record in share.of(range(len(videos.records)))
        for bucket in range(num_buckets)
        for window in range(num_windows)
    ):
        if writer.has_window(videos.records[task.record], videos.buckets[task.bucket], task.window):
            videos.note(task.record, task.bucket)  # or the refused ones, tried again, would be all that were seen
        else:
            tasks.append(task)
    return tasks


def encode_windows(
    writer: LatentCacheWriter,
    vae: torch.nn.Module,
    videos: VideoDataset,
    tasks: list[Task],
    share: Share,
    num_workers: int,
) -> int:
    """Decode in `num_workers` processes, encode one clip at a time, add to the cache; → how many were added."""
    num_added = 0
    dtype = next(vae.parameters()).dtype
    loader = DataLoader(_Windows(videos, tasks), batch_size=None, num_workers=num_workers)
    for task, stamp, sample in share.progress(loader, "windows"):
        record, bucket = videos.records[task.record], videos.buckets[task.bucket]
        if isinstance(sample, ClipError):
            videos.note(task.record, task.bucket, sample)
            writer.add_refusal(record, bucket, task.window, stamp, sample)
            continue
        videos.note(task.record, task.bucket)
        # encode_moments widens to float32 what the VAE computed in `dtype`: going back loses nothing.
        moments = encode_moments(vae, sample["pixel_values"][None])[0].to(dtype)
        writer.add_window(record, bucket, task.window, stamp, moments, sample["raw_frames"])
        num_added += 1
    return num_added


def encode_captions(
    writer: LatentCacheWriter, settings: TrainingSettings, captions: list[str], share: Share, device: torch.device
) -> None:
    """Add the captions' features; the text encoder leaves memory afterwards."""
    if not captions:
        return
    base = resolve_pipeline_directory(settings.pretrained_model_name_or_path)
    tokenizer = load_component(base, "tokenizer")
    text_encoder = load_component(base, "text_encoder", compute_dtype(settings, device)).to(device)
    for caption in share.progress(captions, "captions"):
        writer.add_prompt(caption, encode_prompts(tokenizer, text_encoder, [caption], settings.max_sequence_length)[0])


def extents(settings: TrainingSettings) -> tuple[list[tuple[list[ClipRecord], int, int]], list[str]]:
    """What belongs into the cache: (records, number of buckets, windows of each) for training and held-out
    clips, of which validation reads the first window in the first bucket; and all captions with the empty
    one, for dropout."""
    # Labels are not in the cache: they are read from the index, which may change without it.
    train, held_out = read_records(settings, needs_control=False)
    num_buckets = len(video_dataset(settings, []).buckets)
    captions = list(dict.fromkeys(["", *(record.caption for record in train + held_out)]))
    return [(train, num_buckets, settings.windows_per_clip), (held_out, 1, 1)], captions


def precompute(settings: TrainingSettings, renew: bool = False) -> dict[str, int]:
    """Bring the cache up to date with the settings; returns how many windows and captions this process added, and
    how many clips it refused.

    `renew` first deletes all that the cache holds. Raises UserError.
    """
    share = Share.of_this_process()
    parts, captions = extents(settings)
    fingerprint = cache_fingerprint(settings)
    refuse_unwritable(settings.latent_cache_dir, "latent_cache_dir")
    if renew:
        if share.count > 1:
            raise UserError("--renew deletes what other processes may be writing; use it with one process")
        clear_cache(settings.latent_cache_dir)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    with LatentCacheWriter(settings.latent_cache_dir, fingerprint) as writer:
        captions = [c for c in share.of(captions) if not writer.has_prompt(c)]
        encode_captions(writer, settings, captions, share, device)
        work = []
        for records, *extent in parts:
            videos = video_dataset(settings, records)
            work.append((videos, missing_tasks(writer, videos, *extent, share)))
        num_windows = 0
        if any(tasks for _, tasks in work):
            base = resolve_pipeline_directory(settings.pretrained_model_name_or_path)
            vae = load_component(base, "vae", compute_dtype(settings, device)).to(device)
            for videos, tasks in work:
                num_windows += encode_windows(writer, vae, videos, tasks, share, settings.dataloader_num_workers)
    num_refused = sum(videos.count_refused() for videos, _ in work)
    return {"windows": num_windows, "captions": len(captions), "refused": num_refused}


def _amount(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    words = sys.argv[1:]
    config, dry_run, overrides = parse_launch_line([word for word in words if word != "--renew"])
    settings = load_settings(config, overrides)
    for name in ("latent_cache_dir", "windows_per_clip", "data_root", "index_file", "pretrained_model_name_or_path"):
        if not getattr(settings, name):
            raise SettingError(name, "must be set to precompute a cache")
    if dry_run:
        parts, captions = extents(settings)
        counts = {"windows": sum(len(r) * buckets * k for r, buckets, k in parts), "captions": len(captions)}
        done = " belong"
    else:
        counts = precompute(settings, renew="--renew" in words)
        refused = f", {_amount(counts['refused'], 'clip')} refused" if counts["refused"] else ""
        done = f" added{refused}; all others were there already{Share.of_this_process()}"
    amounts = f"{_amount(counts['windows'], 'window')} and {_amount(counts['captions'], 'caption')}"
    print(f"{settings.latent_cache_dir}: {amounts}{done}")


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
