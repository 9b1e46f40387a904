"""One training sample from a (record, bucket, draw) key: which window of which clip, and what to do about bad
clips.

A window's start is a function of the run's seed, the clip and the draw. A clip that cannot be used
(unreadable, or too short for the bucket) is replaced by another one that the key chooses, so that resumed
runs and other world sizes replace it alike; it is named once in the log and counted.

Shapes: B batch · F latent frames · N raw frames, N = 4(F−1)+1 · C latent channels · H W latent height/width
(pixels h w).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from common.config.errors import UserError
from common.config.settings import VAE_TIME_FACTOR
from common.data.buckets import Bucket, SampleKey, stable_hash
from common.data.index import ClipRecord
from common.data.video import ClipError, UnreadableVideo, Video, source_frames

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 100  # other clips tried in the place of one that cannot be used
SHARE_COUNTED_FROM = 100  # clips; the share of unreadable ones among fewer says little

UNSEEN, USABLE, TOO_SHORT, UNREADABLE = range(4)


def window_start(first: int, last: int, clip: str, num_frames: int, draw: int, seed: int, windows_per_clip: int) -> int:
    """The source frame in first … last at which a window begins.

    With windows_per_clip = 0 it is drawn anew for every `draw`, from the run's seed. With K there are K
    starts, one in each K-th of the range, taken in turn; they do not depend on the seed, so that all stages
    can share a latent cache.
    """
    count = last - first + 1
    if windows_per_clip == 0:
        return first + stable_hash("fresh window", seed, clip, num_frames, draw) % count
    k = draw % windows_per_clip
    begin, end = (
        count * k // windows_per_clip,
        max(count * (k + 1) // windows_per_clip, count * k // windows_per_clip + 1),
    )
    return first + begin + stable_hash("fixed window", clip, num_frames, k, windows_per_clip) % (end - begin)


def clip_identity(record: ClipRecord) -> str:
    """What tells one clip from all others and stays the same when the index is extended, reordered or
    moved."""
    return f"{record.name}@{record.valid_frame_idx}"


class ClipDataset(Dataset):
    """Choice of windows and replacement of bad clips; subclasses fetch the sample itself.

    Args:
        records: the clips.
        buckets: the shapes; keys refer to both by place.
        fps: frames per second of the windows.
        seed, windows_per_clip: see `window_start`.
        needs_control: give `control_indices` with each sample.
        max_unreadable_share: stop with UserError when more than this share of the clips seen is unreadable.
    """

    def __init__(
        self,
        records: Sequence[ClipRecord],
        buckets: Sequence[Bucket],
        *,
        fps: float,
        seed: int = 0,
        windows_per_clip: int = 0,
        needs_control: bool = False,
        max_unreadable_share: float = 0.01,
    ):
        self.records, self.buckets = list(records), list(buckets)
        self.fps, self.seed, self.windows_per_clip = fps, seed, windows_per_clip
        self.needs_control, self.max_unreadable_share = needs_control, max_unreadable_share
        # One byte per clip and bucket, shared by all workers: a clip is named once, and the share is that of
        # all of them.
        self.states = torch.zeros(len(self.buckets), len(self.records), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def fetch(self, record: ClipRecord, bucket: Bucket, draw: int) -> dict[str, Any]:
        """The sample of one clip: `raw_frames` int64 [N] (source frames shown) and what the subclass adds.

        Raises ClipError when the clip cannot be used.
        """
        raise NotImplementedError

    def __getitem__(self, key: SampleKey | tuple[int, int, int]) -> dict[str, Any]:
        """The sample of a key, or of the clip that replaces it. Raises UserError when too many clips are
        bad."""
        key = SampleKey(*key)
        index = key.record
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            sample = self.try_clip(index, key.bucket, key.draw, replaced=True)
            if sample is not None:
                return sample | {"slot": key.slot}
            refused, index = index, stable_hash("replacement", self.seed, *key[:3], attempt) % len(self.records)
        bucket = self.buckets[key.bucket]
        seconds = (bucket.num_frames - 1) / self.fps
        raise UserError(
            f"frame_buckets: found no clip for {bucket.num_frames} frames at {self.fps:g} fps ({seconds:.2f} s) among "
            f"{MAX_REPLACEMENTS} tried, the last {self.records[refused].path}; use fewer frames or longer clips"
        )

    def fetch_batch(self, fetch: Callable[["ClipDataset"], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The samples of one batch: what `fetch` takes from this data set."""
        return fetch(self)

    def try_clip(self, index: int, bucket_index: int, draw: int, replaced: bool = False) -> dict[str, Any] | None:
        """The sample of one clip without `slot`, or None, noted and logged, when it cannot be used; `replaced` as
        of `note`.

        A clip refused once is tried again all the same: what is skipped must not depend on what was met
        before, or a resumed run would differ from an unbroken one.
        """
        record, bucket = self.records[index], self.buckets[bucket_index]
        try:
            sample = self.fetch(record, bucket, draw)
        except ClipError as error:
            self.note(index, bucket_index, error, replaced)
            return None
        self.note(index, bucket_index)
        sample["caption"] = record.caption
        raw_frames = sample.pop("raw_frames")
        sample["sample_id"] = f"{record.name}@{int(raw_frames[0])}"
        if self.needs_control:
            signals = torch.tensor(record.control_at(raw_frames), dtype=torch.int64)  # [N]
            first = signals[:1].expand(VAE_TIME_FACTOR)  # latent frame 0 is of one raw frame
            sample["control_indices"] = torch.cat([first, signals[1:]]).unflatten(0, (-1, VAE_TIME_FACTOR))  # [F, 4]
        return sample

    def note(self, index: int, bucket_index: int, error: ClipError | None = None, replaced: bool = False) -> None:
        """Remember that a clip was usable, or was refused with `error`; a refusal is logged the first time, and
        that another clip takes its place if it is `replaced`.

        Raises UserError when the share of unreadable clips becomes too large.
        """
        if error is None:
            if self.states[bucket_index, index] == UNSEEN:
                self.states[bucket_index, index] = USABLE
            return
        state = UNREADABLE if isinstance(error, UnreadableVideo) else TOO_SHORT
        if self.states[bucket_index, index] == state:
            return
        self.states[bucket_index, index] = state
        entry = self.records[index].entry
        num_unreadable, num_seen = self.counts()
        allowed = self.max_unreadable_share * max(num_seen, min(len(self.records), SHARE_COUNTED_FROM))
        if state == UNREADABLE and num_unreadable > allowed:
            raise UserError(
                f"{num_unreadable} of {num_seen} videos seen cannot be read, more than max_unreadable_share "
                f"{self.max_unreadable_share:g} allows; the last is index entry {entry}: {error}"
            )
        logger.warning("skipping index entry %d%s: %s", entry, ", another clip takes its place" * replaced, error)

    def counts(self) -> tuple[int, int]:
        """(clips found unreadable, clips looked at), over all workers of this process."""
        states = self.states.amax(dim=0)
        return int((states == UNREADABLE).sum()), int((states != UNSEEN).sum())

    def count_refused(self) -> int:
        """Clips found unreadable, or too short for one of the buckets."""
        return int((self.states.amax(dim=0) > USABLE).sum())


class VideoDataset(ClipDataset):
    """Decodes the window: pixel_values uint8 [N, 3, h, w]. The arguments are those of ClipDataset."""

    def fetch(self, record: ClipRecord, bucket: Bucket, draw: int) -> dict[str, Any]:
        video = Video(record.path)
        last = video.last_start(record.valid_frame_idx, bucket.num_frames, self.fps)
        start = window_start(
            record.valid_frame_idx,
            last,
            clip_identity(record),
            bucket.num_frames,
            draw,
            self.seed,
            self.windows_per_clip,
        )
        frames = source_frames(video.timestamps, start, bucket.num_frames, self.fps)
        return {"pixel_values": video.read(frames, bucket.height, bucket.width), "raw_frames": torch.from_numpy(frames)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of one bucket as a batch: tensors stacked, `captions` and `sample_ids` lists, `slots` int64
    [B]."""
    batch: dict[str, Any] = {
        "captions": [sample["caption"] for sample in samples],
        "sample_ids": [sample["sample_id"] for sample in samples],
        "slots": torch.tensor([sample["slot"] for sample in samples], dtype=torch.int64),
    }
    for name, value in samples[0].items():
        if isinstance(value, torch.Tensor):
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch
