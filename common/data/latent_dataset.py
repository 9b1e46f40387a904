"""Samples from a latent cache and, for what it lacks, from the videos: the same numbers, sooner or later.

Shapes: F latent frames · C latent channels · H W latent height/width · L text tokens · D text width.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from common.config.errors import UserError
from common.data.buckets import Bucket
from common.data.dataset import ClipDataset, VideoDataset
from common.data.index import ClipRecord
from common.data.latent_cache import LatentCache, NotInCache

logger = logging.getLogger(__name__)


class LatentDataset(ClipDataset):
    """The samples of VideoDataset, encoded: latent_moments [F, 2C, H, W], prompt_embeds [L, D], in the cache's type.

    Args:
        cache: where they are.
        videos: the same samples as pixels, for what the cache lacks; None where only the cache will do.
    """

    def __init__(
        self,
        records: list[ClipRecord],
        buckets: list[Bucket],
        cache: LatentCache,
        videos: VideoDataset | None = None,
        **options: Any,
    ):
        super().__init__(records, buckets, **options)
        self.cache, self.videos, self.has_warned = cache, videos, False
        if videos is not None:
            videos.states = self.states  # bad clips are counted once

    def fetch(self, record: ClipRecord, bucket: Bucket, draw: int) -> dict[str, Any]:
        moments, frames = self.cache.window(record, bucket, draw % self.windows_per_clip)
        return {
            "latent_moments": moments,
            "prompt_embeds": self.cache.prompt(record.caption),
            "raw_frames": torch.from_numpy(frames),
        }

    def fetch_batch(self, fetch: Callable[[ClipDataset], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """`fetch` from the cache or, when that lacks any of it, all from the videos: a batch has one form."""
        try:
            return fetch(self)
        except NotInCache as error:
            if self.videos is None:
                raise
            if not self.has_warned:  # by each data worker: for 10,000 clips that would be 10,000 lines
                what = "is encoded while training: slow, and VAE and text encoder take memory"
                logger.warning("what the cache lacks %s; the first: %s", what, error)
            self.has_warned = True
            try:
                return fetch(self.videos)
            except UserError as failure:
                raise UserError(f"{error}; nor do the videos serve: {failure}") from failure
