"""Stage 2 on the mini world, on a laptop's CPU: the control adapter.

Command:   cd stage2 && bash train_text_to_video_sft.sh --config training/miniworld_config.py
Needs:     outputs/miniworld/ as scripts/quickstart.sh makes it. On two CPU cores: about two minutes.
"""

from stage2.training.control import ControlSettings

args = ControlSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/miniworld/stage1_fused"  # str: directory, or an earlier stage 2
args.output_dir = "../../outputs/miniworld/stage2"  # str: checkpoints, logs, sample videos, and the result

# --- data
args.data_root = "../../outputs/miniworld"  # str: directory that the index's video paths are relative to
args.index_file = "../../outputs/miniworld/index.json"  # str: index of clips
args.validation_index_file = "../../outputs/miniworld/heldout.json"  # str: clips of another seed
args.height_buckets = [64]  # list[int]: heights in pixels
args.width_buckets = [96]  # list[int]: widths in pixels
args.frame_buckets = [33]  # list[int]: raw frames of a training clip: 9 latent frames
args.windows_per_clip = 1  # int: fixed windows per clip, as the cache needs
args.latent_cache_dir = "../../outputs/miniworld/latents"  # str: made once by common.tools.precompute, for all stages
args.dataloader_num_workers = 0  # int: cached latents need no worker
args.max_sequence_length = 64  # int: text tokens, as the mini base was made with

# --- control adapter
args.control_dim = 64  # int: width of a signal's row in the fixed orthogonal table (no CLIP needed)
args.control_start_layer = 0  # int: the first layer that a control block follows
args.control_end_layer = 6  # int: one past the last
args.control_tokens_per_frame = 8  # int: with 1, as published, a held signal adds the same to the whole picture
args.control_dropout = 0.1  # float: share of samples trained with the null signal, for guidance
args.control_label = "mean"  # str: of a latent frame: the mean row of its raw frames, or that of the "last"

# --- optimisation
args.train_batch_size = 4  # int: samples per step
args.max_train_steps = 60  # int: optimizer steps of the whole run
args.learning_rate = 5e-4  # float: peak learning rate of AdamW
args.lr_warmup_steps = 5  # int: optimizer steps over which it rises from zero
args.mixed_precision = "no"  # str: all float32
args.gradient_checkpointing = False  # int | bool: there is memory enough

# --- checkpoints, logs, validation
args.checkpointing_steps = 20  # int: optimizer steps between checkpoints
args.checkpoints_total_limit = 1  # int | None: how many checkpoints are kept
args.logging_steps = 10  # int: optimizer steps between log lines
args.validation_steps = 60  # int: held-out loss at the start and the end, sample videos at the end
args.validation_prompts = [  # list[str]: one sample video each
    "A red car drives through a wide sandy desert with red mesas under a clear sky. Striped kerbs line the road.",
]
args.validation_num_inference_steps = 8  # int: denoising steps of the sample videos
args.validation_control = "D*16,DL*17"  # str: control of the sample videos, signal*raw frames
args.validation_guidance_scale = 1.0  # float: text guidance of the sample videos
args.validation_control_guidance_scale = 2.0  # float: control guidance of the sample videos
