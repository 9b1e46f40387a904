"""Real video files of a few pixels, and toy.py importable for the tests beside it."""

import json
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

NUM_CLIPS, NUM_FRAMES, SIZE = 14, 14, 32


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """A data root: 14 clips of 14 frames, 32×32 pixels, moving gratings of one colour each; and index.json."""
    root = tmp_path_factory.mktemp("toy_data")
    entries, x = [], np.arange(SIZE)
    for clip in range(NUM_CLIPS):
        wave = [128 + 100 * np.sin(x / 4 + frame * (0.2 + clip / 20)) for frame in range(NUM_FRAMES)]
        colour = np.array([clip % 3 + 1, (clip + 1) % 3 + 1, 3]) / 3
        frames = (np.array(wave)[:, None, :, None] * np.ones((1, SIZE, 1, 1)) * colour).astype(np.uint8)
        imageio.mimwrite(root / f"{clip}.mp4", frames, format="FFMPEG", fps=16, macro_block_size=1)
        entries.append(
            {"path": f"{clip}.mp4", "caption": f"clip {clip}", "control_signal_seq": "D", "valid_frame_idx": 0}
        )
    (root / "index.json").write_text(json.dumps({"list": entries}))
    return root
