"""Makes barcode.py and cached_run.py importable for the tests beside them; clips, and a cache of them."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from barcode import write_video  # noqa: E402
from cached_run import settings  # noqa: E402

from common.tools.precompute import precompute  # noqa: E402


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    entries = []
    for clip in range(5):
        name = f"clip_{clip}.mp4"
        write_video(root / name, 6 if clip == 1 else 30 + 5 * clip, "30000/1001" if clip % 2 else 16)
        labels = ",".join(("D", "DL", "N")[(clip + frame // 4) % 3] for frame in range(20))
        entries.append({"path": name, "caption": f"A red car, {clip}.", "control_signal_seq": labels})
    entries[3]["caption"] = entries[0]["caption"]
    (root / "index.json").write_text(json.dumps({"list": entries}))
    return root


@pytest.fixture(scope="package")
def cache(data, tiny_base, tmp_path_factory):
    """A finished float32 cache, read only."""
    directory = tmp_path_factory.mktemp("cache")
    # 3 clips that are long enough and 1 that is not, in 2 buckets and 2 windows; 1 held out; "" and 4 captions.
    assert precompute(settings(data, tiny_base, directory)) == {"windows": 13, "captions": 5, "refused": 1}
    return directory


@pytest.fixture
def own_cache(cache, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))
