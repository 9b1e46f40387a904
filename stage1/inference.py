"""Stage 1: a clip from a prompt, by a base model, a fused one, or a base with its LoRA beside it.

python stage1/inference.py --model_path outputs/stage1_fused --prompt "…" --output clip.mp4
python stage1/inference.py --model_path models/CogVideoX-2b --lora_path outputs/stage1 --prompt "…"
"""

import numpy as np
from diffusers import CogVideoXPipeline

from common.cogvideox.loading import device_and_dtype
from common.cogvideox.lora import add_lora, find_lora_file
from common.cogvideox.pipeline_io import load_components, read_model_index
from common.config.errors import run_cli
from common.data.video_writer import to_frames
from common.tools.fuse_lora_weights import add_lora_option
from common.tools.inference import (
    OUT_OF_MEMORY_HELP,
    add_clip_options,
    generator_for,
    make_parser,
    one_chunk,
    parse_arguments,
    save,
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--lora_path", help="stage 1's output_dir, or a LoRA file")
    add_lora_option(parser)
    add_clip_options(parser, default="the model's")
    args = parse_arguments(parser)
    read_model_index(args.model_path, expected="CogVideoXPipeline")
    lora_file = find_lora_file(args.lora_path) if args.lora_path else None
    device, dtype = device_and_dtype(args.device, args.dtype)
    pipeline = CogVideoXPipeline(**load_components(args.model_path, dtype))
    if lora_file is not None:
        add_lora(pipeline.transformer, lora_file, args.lora_alpha)
    pipeline.to(device)

    def make() -> np.ndarray:
        video = pipeline(
            args.prompt,
            negative_prompt=args.negative_prompt,
            num_frames=args.num_frames,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps or 50,
            guidance_scale=6.0 if args.guidance_scale is None else args.guidance_scale,
            generator=generator_for(pipeline, args.seed),
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            output_type="np",
        ).frames[0]
        return to_frames(video)

    save(args, one_chunk(make), None, None)


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
