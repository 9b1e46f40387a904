"""The toy objective as a config module, for tests that start real processes."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toy import toy_settings

args = toy_settings(os.environ["TOY_DATA"], os.environ["TOY_OUTPUT"])
