#!/usr/bin/env bash
# Measures the README's table "Training at full size": each row is a run, and OUTPUT/ROW.json what it found.
#
#   bash scripts/benchmark_training.sh [ROW ...]     the rows named, or all: those below, at 33 frames (stage 1: 49);
#                                                    ROW-65 is the same row at 65 frames
#   GPU_IDS=0,1          a row of one GPU takes the first, one of two takes both; CUDA_VISIBLE_DEVICES or all by default
#   SIZE=2b              or 5b, mini
#   OUTPUT=outputs/benchmark_training/SIZE           a row that is there is not measured again
#   MODELS=models        where random-SIZE-stageN are, which are made there if they are not
#   OPTIONS="--steps 20" further options and settings of every row
#   PYTHON=python        the interpreter, in whose environment requirements.txt is installed
# Started twice with different GPU_IDS and rows, it measures both beside each other.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
: "${PYTHON:=python}" "${SIZE:=2b}" "${OUTPUT:=outputs/benchmark_training/$SIZE}" "${MODELS:=models}" "${OPTIONS:=}"
: "${GPU_IDS:=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd,)}}"
IFS=, read -r -a gpus <<< "$GPU_IDS"

low="--optimizer adamw_8bit --trained_weights bfloat16"
text="--teacher_control_guidance_scale 1" # the teacher of stage 4 is guided by text alone
# row, stage, on what, settings; all blocks recompute their activations where neither a number nor False is given
rows="
s1          1 one   --rank 128 --gradient_checkpointing False
s1-memory   1 one   --rank 128 --optimizer adamw_8bit
s2          2 one   $low --gradient_checkpointing False
s2-memory   2 one   $low
s3-eager    3 one   --compile False
s3-all      3 one
s3          3 one   --gradient_checkpointing 3
s3-none     3 one   --gradient_checkpointing False
s3-budget   3 one   --gradient_checkpointing False --activation_budget 0.5
s3-memory   3 one   $low --step_in_backward
s4          4 one   $low $text --gradient_checkpointing 18
s4-none     4 one   $low $text --gradient_checkpointing False
s4-both     4 one   $low --gradient_checkpointing 18
s4-lora     4 one   --rank 128 --optimizer adamw_8bit $text
s1-ddp      1 ddp   --rank 128 --gradient_checkpointing False
s2-ddp      2 ddp   $low
s3-ddp      3 ddp   --gradient_checkpointing 3
s4-ddp      4 ddp   $low $text --gradient_checkpointing 18
s3-fsdp2    3 fsdp2 --gradient_checkpointing 3
s4-fsdp2    4 fsdp2 $text --gradient_checkpointing 18
"

line_of() { # ROW → its line above; none if there is no such row
    awk -v name="${1%-65}" '$1 == name' <<< "$rows"
}

make_model() { # STAGE DIRECTORY: what that stage leaves; of two scripts that want the same, one makes it
    mkdir -p "$MODELS"
    (
        flock 9
        [[ -e $2/model_index.json ]] || "$PYTHON" -m common.tools.make_model --size "$SIZE" --stage "$1" \
            --small_text_encoder --output_dir "$2"
    ) 9> "$MODELS/.lock"
}

measure() { # ROW
    local stage layout settings config frames=33 base model visible start=("$PYTHON")
    read -r _ stage layout settings < <(line_of "$1")
    case $stage in
        1) config=stage1/training/lora_config.py frames=49 ;;
        2) config=stage2/training/sft_config.py settings="--control_text_encoder= $settings" ;;
        3) config=stage3/training/sft_config.py ;;
        4) config=stage4/training/scm_config.py ;;
    esac
    [[ $1 != *-65 ]] || frames=65
    if [[ $layout == one ]]; then
        visible=${gpus[0]:-}
    elif ((${#gpus[@]} < 2)); then
        echo "$1: left out, for it takes two GPUs; GPU_IDS is \"$GPU_IDS\"" >&2
        return
    else
        visible=${gpus[0]},${gpus[1]}
        start+=(-m common.tools.launch --config_file "$root/scripts/accelerate/$layout.yaml" --num_processes 2)
        start+=(--num_machines 1 --machine_rank 0 --main_process_port 0)
    fi
    base=$((stage > 1 ? stage - 1 : 1)) # stages 1 and 2 start from the same
    model=$MODELS/random-$SIZE-stage$base
    make_model "$base" "$model" || return 1
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=$visible "${start[@]}" -m common.tools.benchmark_training --config "$root/$config" \
        --model_path "$model" --batch_size 1 --frames $frames --compile $settings $OPTIONS --output "$OUTPUT/$1.json"
}

names=("$@")
(($#)) || mapfile -t names < <(awk 'NF {print $1}' <<< "$rows")
for name in "${names[@]}"; do
    if [[ -z $(line_of "$name") ]]; then
        echo "error: no row is called $name; there are$(awk 'NF {printf " " $1}' <<< "$rows")" >&2
        exit 2
    fi
done
failed=0
measured=()
for name in "${names[@]}"; do
    file=$OUTPUT/$name.json
    if [[ -e $file ]]; then
        echo "$name: $file is there already" >&2
    else
        measure "$name" || failed=1 # a row that takes too much memory says so, and the next one begins
    fi
    [[ ! -e $file ]] || measured+=("$file")
done
((${#measured[@]} == 0)) || "$PYTHON" -m common.tools.benchmark_training_table "${measured[@]}"
exit $failed
