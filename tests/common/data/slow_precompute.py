"""common.tools.precompute with a shard for every few entries and a pause after each: something to kill, and to find."""

import functools
import os
import time

from common.config.errors import run_cli
from common.tools import precompute
from common.training.encoding import encode_moments


def encode_slowly(*arguments):
    time.sleep(float(os.environ["PAUSE"]))
    return encode_moments(*arguments)


precompute.encode_moments = encode_slowly
precompute.LatentCacheWriter = functools.partial(precompute.LatentCacheWriter, shard_bytes=1)

if __name__ == "__main__":
    run_cli(precompute.main)
