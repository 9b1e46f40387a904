"""Stage 3 on CogVideoX-2B: Swin-DPM, full fine-tune on windows of rising noise, which stream without end.

Command:   bash stage3/train_text_to_video_sft.sh            (--dry_run shows sizes and leaves)
Hardware:  2.0 B trained parameters. One H200, a cached sample of 33 frames a step: .58 s in 54 GiB with --compile
           --gradient_checkpointing 3; .73 s in 11 GiB with --compile --optimizer adamw_8bit --trained_weights bfloat16
           --step_in_backward. More GPUs: see scripts/accelerate/.
Expect:    `validation/loss_group0` … `loss_group3` fall together; the noisiest group is learnt first.
Next:      outputs/stage3 is stage 4's pretrained_model_name_or_path; python stage3/inference.py streams from it.
"""

from stage3.training.swin_dpm import SwinDPMSettings

args = SwinDPMSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/stage2"  # str: pipeline directory or hub id to start from
args.output_dir = "../../outputs/stage3"  # str: checkpoints, logs, sample videos, and the result
args.seed = 42  # int: of everything that is drawn

# --- data
args.data_root = "../../datasets/game"  # str: directory that the index's video paths are relative to
args.index_file = "../../datasets/game/index.json"  # str: index of clips; its forms are in data/README.md
args.height_buckets = [480]  # list[int]: heights in pixels, multiples of 16
args.width_buckets = [720]  # list[int]: widths in pixels, multiples of 16
args.frame_buckets = [17, 33]  # list[int]: raw frames of a window; 17 serves live use with one latent frame per group
args.fps = 16  # int: frames per second the model sees; videos of other rates are resampled by time
args.dataloader_num_workers = 8  # int: processes that decode videos
args.latent_cache_dir = ""  # str: directory made by common.tools.precompute; "" encodes while training
args.caption_dropout = 0.1  # float: share of samples trained without caption, for guidance

# --- sliding window
args.num_noise_groups = 4  # int: a window is one condition frame and this many groups of rising noise
args.uniform_timestep_share = 0.2  # float: share of samples with one timestep for all frames: a stream's start
args.offset_noise = 0.0  # float: strength of a smooth deviation that training undoes, against drift
args.window_frames = []  # list[int]: cut windows of these raw frames at random offsets; [] takes whole clips
args.condition_timestep = -1  # int: noise level of the condition frame; -1 leaves it clean
args.control_dropout = 0.1  # float: share of samples trained with the null signal, for guidance
args.control_label = ""  # str: a latent frame is told the "mean" of its raw frames, or the "last"; "" as the base

# --- optimisation
args.train_batch_size = 1  # int: samples per GPU and micro-step
args.gradient_accumulation_steps = 1  # int: micro-steps per optimizer step
args.max_train_steps = 50_000  # int: optimizer steps of the whole run
args.learning_rate = 1e-5  # float: peak learning rate of AdamW
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
args.validation_num_inference_steps = 20  # int: denoising steps in all; 20/4 per window shift
args.validation_guidance_scale = 6.0  # float: text guidance of the sample videos
args.validation_control_guidance_scale = 3.0  # float: control guidance of the sample videos; 1 for none
