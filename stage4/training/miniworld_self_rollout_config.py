"""Stage 4's second part on the mini world: the distilled student is trained on its own streams (self-rollout).

Command:   cd stage4 && bash train_text_to_video_scm.sh --config training/miniworld_self_rollout_config.py
Needs:     outputs/miniworld/ as scripts/quickstart.sh makes it. On two CPU cores: two minutes for ten steps, which
           show the machinery; the recipe of the shipped weights is in data/miniworld/weights/README.md.
"""

from stage4.training.self_rollout_settings import SelfRolloutSettings

args = SelfRolloutSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/miniworld/stage3"  # str: the teacher
args.student_model_name_or_path = "../../outputs/miniworld/stage4"  # str: the distilled student to go on from
args.output_dir = "../../outputs/miniworld/stage4_rollout"  # str: checkpoints, logs, sample videos, and the result

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
args.caption_dropout = 0.0  # float: share of samples trained without caption; the student needs none

# --- streams
args.num_noise_groups = 4  # int: as in stages 3 and 4
args.rollouts_per_stream = 24.0  # float: mean number of steps, a window's frames each, until a stream begins anew
args.live_share = 0.5  # float: share of streams told the newest signal for all frames in noise, as at the keyboard
args.held_share = 0.5  # float: share of streams that hold one signal for as long as they last

# --- matching of distributions
args.teacher_guidance_scale = 1.0  # float: the teacher's guidance on text; 1 for none
args.teacher_control_guidance_scale = 2.0  # float: on control; 1 for none, which obeys less and looks truer
args.critic_learning_rate = 2e-4  # float: peak learning rate of the critic, which has to keep up with the student
args.ema_decay = 0.99  # float: decay per step of the student's average
args.learnt_share = 0.5  # float: of the average in what is exported; the rest is the student as it was

# --- optimisation
args.train_batch_size = 4  # int: samples per step
args.max_train_steps = 10  # int: optimizer steps of the whole run
args.learning_rate = 5e-5  # float: peak learning rate of the student
args.lr_warmup_steps = 5  # int: optimizer steps over which it rises from zero
args.mixed_precision = "no"  # str: all float32
args.gradient_checkpointing = False  # int | bool: there is memory enough

# --- checkpoints, logs, validation
args.checkpointing_steps = 5  # int: optimizer steps between checkpoints
args.checkpoints_total_limit = 1  # int | None: how many checkpoints are kept
args.logging_steps = 10  # int: optimizer steps between log lines
args.validation_steps = 10  # int: held-out loss at the start and the end, sample videos at the end
args.validation_prompts = [  # list[str]: one sample video each
    "A red car drives through a wide sandy desert with red mesas under a clear sky. Striped kerbs line the road.",
]
args.validation_control = "D*32,DL*33"  # str: control of the sample videos, signal*raw frames
