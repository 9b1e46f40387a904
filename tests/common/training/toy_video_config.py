"""The toy video objective as a config module; sizes and steps come from the launch line."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toy_video import VideoToySettings

args = VideoToySettings()
args.pretrained_model_name_or_path = args.data_root = os.environ["TOY_DATA"]
args.index_file = os.environ["TOY_DATA"] + "/index.json"
args.output_dir = os.environ["TOY_OUTPUT"]
args.num_validation_clips = 3
args.height_buckets = args.width_buckets = [32]
args.frame_buckets = [9]
args.dataloader_num_workers = 2
args.learning_rate = 1e-3
args.lr_warmup_steps = 2
args.checkpointing_steps = 1000
args.logging_steps = 1
args.validation_steps = 5
args.report_to = "none"
