"""Stage 2: a clip that obeys a control signal.

python stage2/inference.py --model_path outputs/stage2 --prompt "…" --control "D*32,DL*33" --output clip.mp4
"""

import numpy as np

from common.cogvideox.pipeline_cogvideox import CogVideoXControlPipeline
from common.config.errors import run_cli
from common.data.video_writer import to_frames
from common.tools.inference import (
    OUT_OF_MEMORY_HELP,
    add_clip_options,
    add_control_options,
    clip_length,
    generator_for,
    load_pipeline,
    make_parser,
    one_chunk,
    parse_arguments,
    read_control,
    save,
)


def main() -> None:
    parser = make_parser(__doc__)
    add_control_options(parser)
    add_clip_options(parser, default="as many as are controlled")
    args = parse_arguments(parser)
    control = read_control(args)
    num_frames = clip_length(args, control)
    pipeline = load_pipeline(CogVideoXControlPipeline, args)

    def make() -> np.ndarray:
        video = pipeline(
            args.prompt,
            negative_prompt=args.negative_prompt,
            control_signal=control,
            num_frames=num_frames,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps or 50,
            guidance_scale=6.0 if args.guidance_scale is None else args.guidance_scale,
            control_guidance_scale=args.control_guidance_scale,
            generator=generator_for(pipeline, args.seed),
            output_type="np",
        ).frames[0]
        return to_frames(video)

    save(args, one_chunk(make), control, None)


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
