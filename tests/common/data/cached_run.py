"""A small world of clips, the settings of a run on them, and what a cache that does not fit says."""

from dataclasses import replace
from itertools import islice

import pytest

from common.config.errors import UserError
from common.config.settings import TrainingSettings
from common.data.loader import build_train_loader


def settings(data, base, cache="", **changes) -> TrainingSettings:
    values = {
        "pretrained_model_name_or_path": str(base), "data_root": str(data), "index_file": str(data / "index.json"),
        "num_validation_clips": 1, "height_buckets": [32], "width_buckets": [32, 48], "frame_buckets": [9],
        "windows_per_clip": 2, "latent_cache_dir": str(cache), "max_sequence_length": 16, "mixed_precision": "no",
        "dataloader_num_workers": 0, "train_batch_size": 2,
    }  # fmt: skip
    args = TrainingSettings(**(values | changes))
    args.validate()
    return args


def refusal(args: TrainingSettings) -> str:
    """What is said where only the cache will do, as in a recorded step."""
    with pytest.raises(UserError) as error:
        list(islice(build_train_loader(replace(args, cuda_graph=True), False), 12))
    message = str(error.value)
    assert message.startswith("latent_cache_dir: ") and "\n" not in message
    assert "python -m common.tools.precompute --config" in message
    return message
