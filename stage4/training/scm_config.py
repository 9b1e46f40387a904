"""Stage 4 on CogVideoX-2B: stream consistency distillation, one forward per window shift.

Command:   bash stage4/train_text_to_video_scm.sh            (--dry_run shows sizes and leaves)
Hardware:  student and its EMA in float32, the teacher in bf16, up to three teacher forwards a step. One H200, a cached
           sample of 33 frames a step, teacher guided by text alone: 1.17 s in 33 GiB with --compile --optimizer
           adamw_8bit --trained_weights bfloat16 --gradient_checkpointing 18; 1.16 s in 7.9 GiB with --compile
           --optimizer adamw_8bit --rank 128: all three share one base in bf16.
Expect:    `validation/loss` is the distance of one jump from the teacher's ten guided steps; it falls fast at first.
           The sample videos take four forwards to begin with and one for every further half second.
Next:      python stage4/inference.py --model_path outputs/stage4 --prompt "…" --control "D*160" --output drive.mp4
"""

from stage4.training.scm_settings import SCMSettings

args = SCMSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/stage3"  # str: pipeline directory or hub id to start from
args.output_dir = "../../outputs/stage4"  # str: checkpoints, logs, sample videos, and the result
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

# --- sliding window
args.num_noise_groups = 4  # int: as in stage 3
args.uniform_timestep_share = 0.2  # float: share of samples with one timestep for all frames: a stream's start
args.offset_noise = 0.0  # float: strength of a smooth deviation that training undoes, against drift
args.control_dropout = 0.0  # float: share of samples with the null signal; the student needs none

# --- distillation
args.phases_per_group = 1  # int: forwards per window shift of the distilled model
args.num_solver_steps = 40  # int: the teacher's grid: 1000/40 timesteps a step
args.teacher_guidance_scale = 6.0  # float: the teacher's guidance on text, which the student learns; 1 for none
args.teacher_control_guidance_scale = 3.0  # float: the teacher's guidance on control; 1 for none
args.key_press_share = 0.5  # float: share of samples told another signal for all frames in noise, as at a key press
args.huber_c = 0.01  # float: pseudo-Huber loss: quadratic below, linear above
args.ema_decay = 0.95  # float: decay per step of the target's weights, which are also the result
args.rank = 0  # int: 0 trains a whole copy of the model, more a LoRA of that rank over one base for all three roles
args.lora_alpha = 64.0  # float: the product of the LoRA's factors is scaled by lora_alpha / rank

# --- optimisation
args.train_batch_size = 1  # int: samples per GPU and micro-step
args.gradient_accumulation_steps = 1  # int: micro-steps per optimizer step
args.max_train_steps = 10_000  # int: optimizer steps of the whole run
args.learning_rate = 5e-6  # float: peak learning rate of AdamW
args.lr_scheduler = "constant_with_warmup"  # str: the learning rate's course
args.lr_warmup_steps = 200  # int: optimizer steps over which it rises from zero
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
