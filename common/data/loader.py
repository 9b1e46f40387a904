"""From settings to batches: the endless training loader and the fixed validation batch.

A batch is a dict. On-the-fly: `pixel_values` uint8 [B, N, 3, h, w]. From a latent cache: `latent_moments`
float32 [B, F, 2C, H, W] and `prompt_embeds` [B, L, D]. Always: `captions` and `sample_ids` (lists), `slots`
int64 [B] (place in the global batch); with control `control_indices` int64 [B, F, 4], the signals of
the raw frames under each latent frame, in the order of CONTROL_TOKENS.
"""

import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.config.errors import SettingError, UserError
from common.config.settings import TrainingSettings
from common.data.buckets import BucketBatchSampler, SampleKey, make_buckets
from common.data.dataset import ClipDataset, VideoDataset, collate
from common.data.fingerprint import cache_fingerprint
from common.data.index import ClipRecord, read_index
from common.data.latent_cache import LatentCache, NotInCache
from common.data.latent_dataset import LatentDataset

logger = logging.getLogger(__name__)


class TrainLoader(DataLoader):
    """A DataLoader whose workers hand a user's mistake over as it is, not wrapped into a traceback."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _raising(super().__iter__())


def _raising(batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        # Or the error's traceback would keep the iterator: collected late and out of order, it waits for its workers.
        del batches


class _ErrorCarrier(Dataset):
    """Fetches the samples of a whole batch; a UserError is returned in their place."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]] | UserError:
        try:
            return self.dataset.fetch_batch(lambda dataset: [dataset[key] for key in keys])
        except UserError as error:
            return UserError(str(error))


def _collate_or_error(samples: list[dict[str, Any]] | UserError) -> dict[str, Any] | UserError:
    return samples if isinstance(samples, UserError) else collate(samples)


def _start_worker(_: int) -> None:
    # Ctrl-C and SIGTERM go to the whole process group. The trainer answers them with a checkpoint, for which it still
    # needs its workers: they end when it tells them to, and leave by themselves when it is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_trainer_says_so, daemon=True).start()


def _end_when_the_trainer_says_so() -> None:
    trainer = os.getppid()
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != trainer:
        pass
    os._exit(0)


def read_records(settings: TrainingSettings, needs_control: bool) -> tuple[list[ClipRecord], list[ClipRecord]]:
    """(training clips, held-out clips). Held out is the start of validation_index_file, or the end of
    index_file."""
    records = read_index(settings.index_file, settings.data_root, needs_control)
    wanted = settings.num_validation_clips
    if wanted == 0:
        return records, []
    if settings.validation_index_file:
        return records, read_index(settings.validation_index_file, settings.data_root, needs_control)[:wanted]
    if wanted >= len(records):
        raise SettingError(
            "num_validation_clips",
            f"{wanted} clips are to be held out, but {settings.index_file} has only {len(records)}; lower it",
        )
    return records[:-wanted], records[-wanted:]


def _taken_from_index(settings: TrainingSettings, held_out: list[ClipRecord]) -> int:
    return 0 if settings.validation_index_file else len(held_out)


def build_dataset(
    settings: TrainingSettings, records: list[ClipRecord], needs_control: bool, **changes: Any
) -> ClipDataset:
    """The data set that the settings ask for: from the latent cache if one is set and fits, else decoding the
    videos. `changes` replace options of the data set."""
    options = {
        "fps": settings.fps,
        "seed": settings.seed,
        "windows_per_clip": settings.windows_per_clip,
        "needs_control": needs_control,
        "max_unreadable_share": settings.max_unreadable_share,
        **changes,
    }
    buckets = make_buckets(settings.frame_buckets, settings.height_buckets, settings.width_buckets)
    videos = VideoDataset(records, buckets, **options)
    if not settings.latent_cache_dir:
        return videos
    must_fit = settings.cuda_graph  # in which no video can be encoded
    try:
        cache = LatentCache(settings.latent_cache_dir, cache_fingerprint(settings))
    except NotInCache as error:
        if must_fit:
            raise
        _warn_once(f"videos are encoded while training, which is slow: {error}")
        return videos
    return LatentDataset(records, buckets, cache, None if must_fit else videos, **options)


@functools.cache
def _warn_once(message: str) -> None:
    """Training and held-out clips meet the same cache."""
    logger.warning(message)


def build_train_loader(
    settings: TrainingSettings, needs_control: bool, world_size: int = 1, rank: int = 0, start_step: int = 0
) -> TrainLoader:
    """Endless batches for this process, one per MICRO-step, beginning with micro-step `start_step`
    (= finished optimizer steps × gradient_accumulation_steps).

    It is already divided among the processes: do not pass it through `accelerator.prepare`.
    Raises UserError for a bad index, or when there are fewer clips than a global batch has samples.
    """
    records, held_out = read_records(settings, needs_control)
    dataset = build_dataset(settings, records, needs_control)
    sampler = BucketBatchSampler(
        len(records), len(dataset.buckets), settings.train_batch_size, world_size, rank, settings.seed, start_step,
        num_held_out=_taken_from_index(settings, held_out),
    )  # fmt: skip
    workers = settings.dataloader_num_workers
    return TrainLoader(
        _ErrorCarrier(dataset),
        batch_sampler=sampler,
        collate_fn=_collate_or_error,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def build_validation_batch(settings: TrainingSettings, needs_control: bool) -> dict[str, Any] | None:
    """All held-out clips in the first bucket as one batch, always the same; None when none are held out.

    A clip that cannot be used is left out, with a line in the log; UserError when none can.
    """
    _, records = read_records(settings, needs_control)
    if not records:
        return None
    # Fixed windows, whatever training draws, so that the curve does not move with the seed.
    windows_per_clip = max(settings.windows_per_clip, 1)
    dataset = build_dataset(
        settings, records, needs_control, windows_per_clip=windows_per_clip, max_unreadable_share=1.0
    )
    samples = dataset.fetch_batch(
        lambda data: [sample for index in range(len(records)) if (sample := data.try_clip(index, 0, 0)) is not None]
    )
    if not samples:
        raise UserError(
            f"num_validation_clips: none of the {len(records)} held-out clips can be used for {dataset.buckets[0]} "
            f"at {settings.fps} fps; the first is {records[0].path}"
        )
    return collate([sample | {"slot": slot} for slot, sample in enumerate(samples)])


def describe_data(settings: TrainingSettings, needs_control: bool, world_size: int = 1) -> dict[str, Any]:
    """Sizes for `--dry_run`: clips, held-out clips, buckets, and how many optimizer steps show every clip
    once.

    Reads the index, but opens no video. Raises UserError.
    """
    train, held_out = read_records(settings, needs_control)
    buckets = make_buckets(settings.frame_buckets, settings.height_buckets, settings.width_buckets)
    num_taken = _taken_from_index(settings, held_out)
    sampler = BucketBatchSampler(
        len(train), len(buckets), settings.train_batch_size, world_size, num_held_out=num_taken
    )
    clips_per_step = sampler.global_batch_size * settings.gradient_accumulation_steps
    return {
        "training_clips": len(train),
        "validation_clips": len(held_out),
        "buckets": [str(bucket) for bucket in buckets],
        "clips_per_optimizer_step": clips_per_step,
        "optimizer_steps_per_epoch": round(len(train) / clips_per_step, 2),
    }
