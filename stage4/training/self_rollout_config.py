"""Stage 4's second part on CogVideoX-2B: the distilled student is trained on its own streams (self-rollout).

Command:   bash stage4/train_text_to_video_scm.sh --config stage4/training/self_rollout_config.py
Needs:     stage 4's output_dir as the student and stage 3's as the teacher.
Hardware:  student and critic with their moments, the student's average in float32, the teacher in bf16: by count 76 GB
           before activations, with --optimizer adamw_8bit --trained_weights bfloat16 36. A step has four forwards of
           the student, with their backward. Of clips only signals and captions matter, so a latent cache saves most
           of the rest. Tried on the mini world alone. Stage 3 has to have been trained with window_frames: it judges
           clips whose first latent is of four frames.
Expect:    `score_gap` falls as what streams look like comes nearer to what the teacher knows; `validation/loss`, the
           distance from the teacher's own path, may rise a little.
Next:      python stage4/inference.py --model_path outputs/stage4_rollout --prompt "…" --control "D*160" \\
               --output drive.mp4
"""

from stage4.training.self_rollout_settings import SelfRolloutSettings

args = SelfRolloutSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/stage3"  # str: the teacher
args.student_model_name_or_path = "../../outputs/stage4"  # str: the distilled student to go on from
args.output_dir = "../../outputs/stage4_rollout"  # str: checkpoints, logs, sample videos, and the result
args.seed = 42  # int: of everything that is drawn

# --- data
args.data_root = "../../datasets/game"  # str: directory that the index's video paths are relative to
args.index_file = "../../datasets/game/index.json"  # str: index of clips; its forms are in data/README.md
args.height_buckets = [480]  # list[int]: heights in pixels, multiples of 16
args.width_buckets = [720]  # list[int]: widths in pixels, multiples of 16
args.frame_buckets = [17, 33]  # list[int]: raw frames of a window: one (for live use) and two latent frames per group
args.fps = 16  # int: frames per second the model sees; videos of other rates are resampled by time
args.dataloader_num_workers = 8  # int: processes that decode videos
args.latent_cache_dir = ""  # str: directory made by common.tools.precompute; "" encodes while training
args.caption_dropout = 0.0  # float: share of samples trained without caption; the student needs none

# --- streams
args.num_noise_groups = 4  # int: as in stages 3 and 4
args.phases_per_group = 1  # int: as in stage 4
args.rollouts_per_stream = 24.0  # float: mean number of steps, a window's frames each, until a stream begins anew
args.live_share = 0.5  # float: share of streams told the newest signal for all frames in noise, as at the keyboard
args.held_share = 0.5  # float: share of streams that hold one signal for as long as they last

# --- matching of distributions
args.teacher_guidance_scale = 6.0  # float: the teacher's guidance on text; 1 for none
args.teacher_control_guidance_scale = 3.0  # float: on control; 1 for none, which obeys less and looks truer
args.critic_learning_rate = 2e-5  # float: peak learning rate of the critic, which has to keep up with the student
args.ema_decay = 0.99  # float: decay per step of the student's average
args.learnt_share = 0.5  # float: of the average in what is exported; the rest is the student as it was

# --- optimisation
args.train_batch_size = 1  # int: samples per GPU and micro-step
args.gradient_accumulation_steps = 1  # int: micro-steps per optimizer step
args.max_train_steps = 4_000  # int: optimizer steps of the whole run
args.learning_rate = 5e-6  # float: peak learning rate of the student
args.lr_scheduler = "cosine"  # str: the learning rate's course
args.lr_warmup_steps = 100  # int: optimizer steps over which it rises from zero
args.weight_decay = 1e-3  # float: decoupled weight decay
args.mixed_precision = "bf16"  # str: "bf16" (frozen weights and products) or "no" (all float32)
args.gradient_checkpointing = True  # int | bool: blocks recomputed in the backward, to save memory: all or a number

# --- checkpoints, logs, validation
args.checkpointing_steps = 500  # int: optimizer steps between checkpoints
args.checkpoints_total_limit = 3  # int | None: how many checkpoints are kept; None keeps all
args.resume_from_checkpoint = "latest"  # str: "latest", "none", or a checkpoint's directory
args.report_to = "tensorboard"  # str: "tensorboard", "wandb" or "none"; the JSONL log is always written
args.validation_steps = 500  # int: optimizer steps between held-out losses and sample videos; 0 for none
args.validation_prompts = [  # list[str]: one sample video each
    "A car drives along a desert road at noon, seen from behind, with mesas on the horizon under a clear sky.",
]
args.validation_control = "D*32,DL*32,D*32,DR*33"  # str: control of the sample videos, signal*raw frames
