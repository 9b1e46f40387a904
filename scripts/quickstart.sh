#!/usr/bin/env bash
# From nothing to an endless, controlled video on two CPU cores in 9 to 13 minutes: draws the mini world and takes its
# base model through the four stages by the same launch scripts as the 2B model.
#
#   bash scripts/quickstart.sh
#
# Everything goes to outputs/miniworld/. A second run reuses what is finished and resumes what is not.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
need_environment
# Training answers Ctrl-C by saving and leaving with 0; without this the next step would begin.
trap 'echo "interrupted; the same command goes on from here"; exit 130' INT TERM

world=outputs/miniworld
videos="$world/drives"
prompt="A red car drives through a wide sandy desert with red mesas under a clear sky. Striped kerbs line the road."
base=data/miniworld/weights/base # trained on a GPU by data.miniworld.make_base
started=$SECONDS
step() { printf '\n=== %s   (%d min %02d s)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

step "1/7  the mini world: 160 clips of 6 s, and 8 held out"
python -m data.miniworld.make_videos --output_dir "$world" --num_clips 160 --seed 0
python -m data.miniworld.make_videos --output_dir "$world" --num_clips 8 --seed 1 --index_name heldout.json

step "2/7  latents and text features, once for all stages"
python -m common.tools.precompute --config stage1/training/miniworld_config.py

step "3/7  stage 1: LoRA, then fused into the base"
(cd stage1 && bash train_text_to_video_lora.sh --config training/miniworld_config.py)
if [[ ! "$world/stage1_fused/model_index.json" -nt "$world/stage1/pytorch_lora_weights.safetensors" ]]; then
    python stage1/fuse_lora_weights.py --pretrained_model_path "$base" --lora_path "$world/stage1" \
        --output_dir "$world/stage1_fused"
fi

step "4/7  stage 2: the control adapter"
(cd stage2 && bash train_text_to_video_sft.sh --config training/miniworld_config.py)

step "5/7  stage 3: Swin-DPM"
(cd stage3 && bash train_text_to_video_sft.sh --config training/miniworld_config.py)

step "6/7  stage 4: SCM distillation"
(cd stage4 && bash train_text_to_video_scm.sh --config training/miniworld_config.py)

step "7/7  drives: a clip of stages 1 and 2, streams of stages 3 and 4"
# drive STAGE MODEL ARGUMENT...: a video, unless it is there and newer than its model (its JSON is written last)
drive() {
    if [[ "$videos/$1.json" -nt "$world/$2/model_index.json" ]]; then
        echo "$videos/$1.mp4 is there already"
        return
    fi
    python "$1/inference.py" --model_path "$world/$2" --output "$videos/$1.mp4" --prompt "$prompt" \
        --height 64 --width 96 --fps 16 --seed 7 "${@:3}"
}
short="D*16,DL*17"
long="D*48,DL*48,D*32,DR*48,N*48,B*48,D*49" # 321 frames: 20 seconds
drive stage1 stage1_fused --num_frames 33 --num_inference_steps 10 --guidance_scale 3
drive stage2 stage2 --control "$short" --num_inference_steps 10 --guidance_scale 1 --control_guidance_scale 2
drive stage3 stage3 --control "$long" --seconds 6 --num_inference_steps 8 --guidance_scale 1 --control_guidance_scale 2
drive stage4 stage4 --control "$long" --seconds 20
python -m common.tools.contact_sheet --output "$world/contact_sheet.png" \
    "mini world=$world/videos_heldout/00000.mp4" "stage 1=$videos/stage1.mp4" "stage 2=$videos/stage2.mp4" \
    "stage 3=$videos/stage3.mp4" "stage 4=$videos/stage4.mp4"

step "done"
cat << TEXT
  a 20-second drive by stage 4:   $videos/stage4.mp4
  all stages at a glance:         $world/contact_sheet.png
  models:                         $world/{stage1,stage1_fused,stage2,stage3,stage4}
  losses, sample videos:          tensorboard --logdir $world

What to try next:
  source .venv/bin/activate
  python stage4/inference.py --model_path $world/stage4 --prompt "A blue car drives through snow." \\
      --control "D*64,DL*64,DR*64" --seconds 60 --output minute.mp4
  cd stage4 && bash train_text_to_video_scm.sh --config training/miniworld_config.py --max_train_steps 1000
TEXT
