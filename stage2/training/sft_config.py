"""Stage 2 on CogVideoX-2B: the control adapter (Interactive Module); all else is frozen, as published, if `rank` is 0.

Command:   bash stage2/train_text_to_video_sft.sh            (--dry_run shows sizes and leaves)
Hardware:  316 M trained parameters beside 1.7 B frozen ones; the published run used 8 GPUs of 80 GB. One H200, a cached
           sample a step: .39 s in 6.5 GiB with --compile --optimizer adamw_8bit --trained_weights bfloat16.
Expect:    `validation/loss` falls below `validation/loss_without_control`: the gap is what the signal is worth.
Next:      outputs/stage2 is stage 3's pretrained_model_name_or_path.
"""

from stage2.training.control import ControlSettings

args = ControlSettings()

# --- model and output
args.pretrained_model_name_or_path = "../../outputs/stage1_fused"  # str: directory or hub id, or an earlier stage 2
args.output_dir = "../../outputs/stage2"  # str: checkpoints, logs, sample videos, and the result
args.seed = 42  # int: of everything that is drawn

# --- data
args.data_root = "../../datasets/game"  # str: directory that the index's video paths are relative to
args.index_file = "../../datasets/game/index.json"  # str: index of clips; its forms are in data/README.md
args.height_buckets = [480]  # list[int]: heights in pixels, multiples of 16
args.width_buckets = [720]  # list[int]: widths in pixels, multiples of 16
args.frame_buckets = [21, 65]  # list[int]: raw frames of a training clip, 4n+1
args.fps = 16  # int: frames per second the model sees; videos of other rates are resampled by time
args.dataloader_num_workers = 8  # int: processes that decode videos
args.latent_cache_dir = ""  # str: directory made by common.tools.precompute; "" encodes while training
args.caption_dropout = 0.1  # float: share of samples trained without caption, for guidance

# --- control adapter
args.control_dim = 768  # int: width of a signal's row; CLIP ViT-L/14's text features have 768
args.control_start_layer = 15  # int: the first layer that a control block follows
args.control_end_layer = 30  # int: one past the last
args.control_attention = "frame_causal"  # str: or "token_causal", the published form
args.control_temporal_position = True  # bool: keys of control attention carry their frame's position
args.control_tokens_per_frame = 1  # int: 1 as published; on the mini world 8 obey far better (README), here untried
args.control_dropout = 0.1  # float: share of samples trained with the null signal, for guidance
args.control_label = "mean"  # str: of a latent frame: the mean row of its raw frames, or that of the "last"
args.control_text_encoder = "openai/clip-vit-large-patch14"  # str: CLIP; "" takes a fixed orthogonal table
args.control_sentences_file = ""  # str: JSON of signal to sentence; "" takes those in control.py

# --- LoRA beside the adapter
args.rank = 0  # int: 0 leaves the base as it is; on the mini world 64 on all linear layers obey better, here untried
args.lora_alpha = 64.0  # float: the product of the LoRA's factors is scaled by lora_alpha / rank
args.lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0"]  # list[str]: ends of the linear layers' names

# --- optimisation
args.train_batch_size = 4  # int: samples per GPU and micro-step
args.gradient_accumulation_steps = 1  # int: micro-steps per optimizer step
args.max_train_steps = 20_000  # int: optimizer steps of the whole run
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
args.validation_control = "D*16,DL*16,D*16,DR*17"  # str: control of the sample videos, signal*raw frames
args.validation_guidance_scale = 6.0  # float: text guidance of the sample videos
args.validation_control_guidance_scale = 1.0  # float: control guidance of the sample videos; 1 for none
