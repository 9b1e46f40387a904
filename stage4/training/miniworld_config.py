"""Stage 4 on the mini world, on a laptop's CPU: stream consistency distillation.

Command:   cd stage4 && bash train_text_to_video_scm.sh --config training/miniworld_config.py
Needs:     outputs/miniworld/ as scripts/quickstart.sh makes it. On two CPU cores: about two minutes.
"""

from stage4.training.scm_settings import SCMSettings

args = SCMSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/miniworld/stage3"  # str: pipeline directory to start from
args.output_dir = "../../outputs/miniworld/stage4"  # str: checkpoints, logs, sample videos, and the result

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

# --- sliding window
args.num_noise_groups = 4  # int: as in stage 3
args.uniform_timestep_share = 0.2  # float: share of samples with one timestep for all frames: a stream's start
args.offset_noise = 0.0  # float: strength of a smooth deviation that training undoes, against drift
args.caption_dropout = 0.0  # float: share of samples trained without caption; the student needs none
args.control_dropout = 0.0  # float: share of samples with the null signal; the student needs none

# --- distillation
args.num_solver_steps = 40  # int: the teacher's grid: 1000/40 timesteps a step
args.teacher_guidance_scale = 1.0  # float: the teacher's guidance on text; 1 for none
args.teacher_control_guidance_scale = 2.0  # float: the teacher's guidance on control, which the student learns
args.key_press_share = 0.5  # float: share of samples told another signal for all frames in noise, as at a key press
args.huber_c = 0.01  # float: pseudo-Huber loss: quadratic below, linear above
args.ema_decay = 0.95  # float: decay per step of the target's weights, which are also the result

# --- optimisation
args.train_batch_size = 4  # int: samples per step
args.max_train_steps = 30  # int: optimizer steps of the whole run
args.learning_rate = 2e-4  # float: peak learning rate of AdamW
args.lr_warmup_steps = 5  # int: optimizer steps over which it rises from zero
args.mixed_precision = "no"  # str: all float32
args.gradient_checkpointing = False  # int | bool: there is memory enough

# --- checkpoints, logs, validation
args.checkpointing_steps = 20  # int: optimizer steps between checkpoints
args.checkpoints_total_limit = 1  # int | None: how many checkpoints are kept
args.logging_steps = 10  # int: optimizer steps between log lines
args.validation_steps = 30  # int: held-out loss at the start and the end, sample videos at the end
args.validation_prompts = [  # list[str]: one sample video each
    "A red car drives through a wide sandy desert with red mesas under a clear sky. Striped kerbs line the road.",
]
args.validation_control = "D*32,DL*33"  # str: control of the sample videos, signal*raw frames
