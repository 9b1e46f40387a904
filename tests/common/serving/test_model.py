"""The played model: what compiling it changes."""

from dataclasses import replace

import numpy as np
import torch

from common.cogvideox.speed import SpeedOptions
from common.serving.model import Start, WorldModel


def test_a_compiled_model_is_ready_when_loaded_and_makes_the_same_world(tiny_world_model):
    plain = tiny_world_model
    told = []
    options = replace(plain.options, speed=SpeedOptions(compile=True))
    try:
        compiled = WorldModel.load(options, plain.info, lambda share, message: told.append((share, message)))
        shares = [share for share, _ in told]
        assert shares == sorted(shares) and shares[-1] < 1 and any("compiling" in message for _, message in told)

        def first_chunks(model):
            stream = model.open(Start("a red car", seed=3), model.encode("a red car"), lambda: "D")
            return np.stack([next(stream)[-4:] for _ in range(3)]).astype(int)

        # A further stream compiles nothing: loading has met all kinds of calls.
        with torch.compiler.set_stance("fail_on_recompile"):
            found = first_chunks(compiled)
        assert np.abs(found - first_chunks(plain)).max() <= 1  # of 255
    finally:
        torch.compiler.reset()
