#!/usr/bin/env bash
# Trains the mini world's base model and four stages on one GPU, by the same programs as the 2B model: the recipe of
# data/miniworld/weights with what has been learnt since.
#
#   bash scripts/train_miniworld.sh [OUTPUT_DIR]        default outputs/miniworld_gpu
#
# The same command goes on where it was stopped. Lengths are set by variables, here with their defaults:
#   CLIPS=3000 VAE_STEPS=4000 BASE_STEPS=30000 STAGE1_STEPS=11000 STAGE2_STEPS=18000 STAGE3_STEPS=20700 STAGE4_STEPS=6000
#   ROLLOUT_STEPS=1700 BATCH_SIZE=64 PROCESSES=8 (for drawing and encoding)
#   GPU_OPTIONS="--mixed_precision bf16 --compile --cuda_graph"
# BASE=DIRECTORY takes a base model of six layers that is there already, VAE=DIRECTORY a trained VAE; both are relative to
# where the script is called, as OUTPUT_DIR is if given.
# On one H200 a step takes 18 ms for the base, 16, 31, 28 and 43 ms in stages 1 to 4, and 64 in self-rollout: 37
# minutes of training by these times, and nine of the VAE, beside drawing and encoding. As a whole it has run on CPUs
# alone.
set -euo pipefail
from_here() { [[ -z $1 ]] || realpath -m -- "$1"; }
out=$(from_here "${1:-}") BASE=$(from_here "${BASE:-}") VAE=$(from_here "${VAE:-}")
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
need_environment
trap 'echo "interrupted; the same command goes on from here"; exit 130' INT TERM
trap 'kill $(jobs -pr) 2>/dev/null || true' EXIT # what runs in the background is deaf to Ctrl-C

: "${out:=outputs/miniworld_gpu}"
world=$out/world
: "${CLIPS:=3000}" "${VAE_STEPS:=4000}" "${BASE_STEPS:=30000}" "${BATCH_SIZE:=64}" "${PROCESSES:=8}"
: "${STAGE1_STEPS:=11000}" "${STAGE2_STEPS:=18000}" "${STAGE3_STEPS:=20700}" "${STAGE4_STEPS:=6000}"
: "${ROLLOUT_STEPS:=1700}"
: "${GPU_OPTIONS=--mixed_precision bf16 --compile --cuda_graph}"
precision=()
[[ $GPU_OPTIONS != *bf16* ]] || precision=(--mixed_precision bf16)
compile=()
[[ $GPU_OPTIONS != *compile* ]] || compile=(--compile)

draw() { # ARGUMENT...
    python -m data.miniworld.make_videos --output_dir "$world" --num_workers "$PROCESSES" "$@"
}
draw --num_clips "$CLIPS" --seed 0
draw --num_clips 16 --seed 1 --index_name heldout.json

if [[ -z $BASE ]]; then
    BASE=$out/base
    draw --num_clips "$CLIPS" --seed 5 --index_name broad.json --world broad
    vae=(--vae_steps "$VAE_STEPS")
    [[ -z $VAE ]] || vae=(--init_vae "$VAE" --vae_minutes 0)
    # The transformer knows the broad world only; stage 1 teaches it the game. Positions and noise schedule are 5B's.
    python -m data.miniworld.make_base --data_root "$world" --index_file "$world/broad.json" \
        --vae_index_file "$world/index.json" --output_dir "$BASE" "${vae[@]}" --vae_image_share 0.25 \
        --vae_batch_size 16 --vae_image_batch_size 64 --patch_size 1 --num_layers 6 --positions rotary \
        --snr_shift_scale 1 --transformer_steps "$BASE_STEPS" --transformer_batch_size "$BATCH_SIZE" \
        --transformer_windows "$((3 * CLIPS))" "${compile[@]}" "${precision[@]}"
fi

# encode FRAMES WINDOWS: windows of so many frames, so many of each clip, by several processes that share the GPU
encode() {
    local rank jobs=()
    for ((rank = 0; rank < PROCESSES; rank++)); do
        RANK=$rank WORLD_SIZE=$PROCESSES LOCAL_RANK=0 python -m common.tools.precompute \
            --config stage1/training/miniworld_config.py --pretrained_model_name_or_path "$BASE" --data_root "$world" \
            --index_file "$world/index.json" --validation_index_file "$world/heldout.json" --frame_buckets "$1" \
            --windows_per_clip "$2" --latent_cache_dir "$out/latents$1" "${precision[@]}" &
        jobs+=($!)
    done
    for rank in "${jobs[@]}"; do wait "$rank"; done
}
encode 33 3
encode 97 1 # whole clips, from which stages 3 and 4 cut their windows

# stage NUMBER STEPS MODEL CACHED_FRAMES WINDOWS ARGUMENT...
# With the config CONFIG and into NAME where they are not the stage's own.
stage() {
    # shellcheck disable=SC2086  # a list of words
    python -m common.tools.train --config "stage$1/training/${CONFIG:-miniworld_config}.py" --max_train_steps "$2" \
        --pretrained_model_name_or_path "$3" --output_dir "$out/${NAME:-stage$1}" --data_root "$world" \
        --index_file "$world/index.json" --validation_index_file "$world/heldout.json" \
        --latent_cache_dir "$out/latents$4" --frame_buckets "$4" --windows_per_clip "$5" \
        --train_batch_size "$BATCH_SIZE" --lr_scheduler cosine --lr_warmup_steps "$(($2 / 20 + 1))" \
        --checkpointing_steps 1000 --validation_steps "$2" --logging_steps 50 --dataloader_num_workers "$PROCESSES" \
        $GPU_OPTIONS "${@:6}"
}
layers=(--lora_target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 norm1.linear norm2.linear)
stage 1 "$STAGE1_STEPS" "$BASE" 33 3 --learning_rate 1e-3 --rank 32 --lora_alpha 32 "${layers[@]}"
if [[ ! $out/stage1_fused/model_index.json -nt $out/stage1/pytorch_lora_weights.safetensors ]]; then
    python stage1/fuse_lora_weights.py --pretrained_model_path "$BASE" --lora_path "$out/stage1" \
        --output_dir "$out/stage1_fused"
fi
stage 2 "$STAGE2_STEPS" "$out/stage1_fused" 33 3 --optimizer muon --learning_rate 1e-3 --rank 64 --lora_alpha 64 \
    "${layers[@]}"
stage 3 "$STAGE3_STEPS" "$out/stage2" 97 1 --window_frames 17 33 --optimizer muon --learning_rate 1e-3 \
    --offset_noise 0.3
stage 4 "$STAGE4_STEPS" "$out/stage3" 97 1 --optimizer muon --learning_rate 2.5e-4 --window_frames 17 33 \
    --offset_noise 0.3
CONFIG=miniworld_self_rollout_config NAME=stage4_rollout stage 4 "$ROLLOUT_STEPS" "$out/stage3" 97 1 \
    --student_model_name_or_path "$out/stage4" --window_frames 17 33 --train_batch_size "$(((BATCH_SIZE + 1) / 2))" \
    --lr_scheduler constant_with_warmup --lr_warmup_steps 100

echo "done; pack what is to be shipped:"
echo "  python -m data.miniworld.pack_weights --output_dir $out/weights base=$BASE \\"
echo "    stage1=$out/stage1 stage2=$out/stage2 stage3=$out/stage3 stage4=$out/stage4_rollout"
