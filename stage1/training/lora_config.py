"""Stage 1 on CogVideoX-2B: LoRA fine-tune on game footage.

Command:   bash stage1/train_text_to_video_lora.sh            (--dry_run shows sizes and leaves)
Hardware:  the published run used 8 GPUs of 80 GB for 100,000 steps at batch 8 per GPU. One H200, a cached
           sample of 49 frames a step, --rank 128 --compile: .84 s in 33 GiB with --gradient_checkpointing False, or
           1.12 s in 7.2 GiB with --optimizer adamw_8bit.
Expect:    the held-out loss falls; sample videos take on the look of the footage within a few thousand steps.
Next:      python stage1/fuse_lora_weights.py --pretrained_model_path models/CogVideoX-2b \\
               --lora_path outputs/stage1 --output_dir outputs/stage1_fused
"""

from stage1.training.lora import LoraSettings

args = LoraSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../models/CogVideoX-2b"  # str: pipeline directory or hub id to start from
args.output_dir = "../../outputs/stage1"  # str: checkpoints, logs, sample videos, and the result
args.seed = 42  # int: of everything that is drawn

# --- data
args.data_root = "../../datasets/game"  # str: directory that the index's video paths are relative to
args.index_file = "../../datasets/game/index.json"  # str: index of clips; its forms are in data/README.md
args.height_buckets = [480]  # list[int]: heights in pixels, multiples of 16
args.width_buckets = [720]  # list[int]: widths in pixels, multiples of 16
args.frame_buckets = [17, 33, 65]  # list[int]: raw frames of a training clip, 4n+1; several make several batch shapes
args.fps = 16  # int: frames per second the model sees; videos of other rates are resampled by time
args.dataloader_num_workers = 8  # int: processes that decode videos
args.latent_cache_dir = ""  # str: directory made by common.tools.precompute; "" encodes while training
args.caption_dropout = 0.1  # float: share of samples trained without caption, for guidance

# --- LoRA
args.rank = 256  # int: rank of the factors added to each of the layers below
args.lora_alpha = 256.0  # float: their product is scaled by lora_alpha / rank
args.lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0"]  # list[str]: ends of the linear layers' names

# --- optimisation
args.train_batch_size = 8  # int: samples per GPU and micro-step
args.gradient_accumulation_steps = 1  # int: micro-steps per optimizer step
args.max_train_steps = 100_000  # int: optimizer steps of the whole run
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
args.validation_guidance_scale = 6.0  # float: text guidance of the sample videos
