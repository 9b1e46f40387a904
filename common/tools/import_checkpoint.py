"""Makes a pipeline directory of a controlled transformer from elsewhere, which then plays and trains as our own.

    python -m common.tools.import_checkpoint --checkpoint downloads/stage4 --stage 4 --base models/CogVideoX-2b \
        --sentences_file sentences.json --control_text_encoder openai/clip-vit-large-patch14 --output_dir models/world

The checkpoint has the published layout: diffusers' CogVideoX keys, `control_embedding.*` and `control_blocks.*`, in one
safetensors file or several, with a config.json or without. What its signals were told to CLIP as is in the sentences
file, a JSON of signal to sentence: {"D": "…", "DL": "…", …}. Other parts come from the base.
"""

from pathlib import Path

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.loading import COUNT, DTYPES
from common.cogvideox.pipeline_io import component_config, load_component, read_model_index, write_pipeline
from common.cogvideox.published import load_published_transformer
from common.cogvideox.scheduler import CogVideoXSwinDPMScheduler, CogVideoXSwinLCMScheduler
from common.config.command_line import ArgumentParser, refuse_unwritable, whole_number
from common.config.errors import SettingError, UserError, run_cli
from common.config.model_directory import resolve_pipeline_directory
from common.data.control_signals import read_sentences

PIPELINES = {2: "CogVideoXControlPipeline", 3: "CogVideoXStreamingPipeline", 4: "CogVideoXStreamingPipeline"}
SCHEDULERS = {3: CogVideoXSwinDPMScheduler, 4: CogVideoXSwinLCMScheduler}


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="safetensors file, folder of them, or a directory of its own")
    add("--stage", type=int, choices=PIPELINES, required=True, help="what it was trained as: 2, 3 or 4")
    add("--base", required=True, help="diffusers' CogVideoX directory or hub id, for all but the transformer")
    add("--output_dir", type=Path, required=True, help="where the pipeline goes")
    add("--sentences_file", type=Path, help="JSON of signal to sentence, as the checkpoint was trained with")
    add("--control_text_encoder", default="openai/clip-vit-large-patch14", help="CLIP directory or hub id")
    add("--control_vocabulary", type=Path, help="a control_vocabulary folder, in the place of sentences and CLIP")
    add("--control_start_layer", type=whole_number(0), help="by default the config's, else as many as there are blocks")
    add("--control_end_layer", type=COUNT, help="goes with --control_start_layer")
    add("--num_noise_groups", type=COUNT, default=4, help="of the window (stages 3 and 4)")
    add("--frames_per_group", type=COUNT, default=2, help="latent frames (stages 3 and 4)")
    add("--dtype", choices=DTYPES, help="of the written weights; by default as stored")
    args = parser.parse_args()
    if (args.sentences_file is None) == (args.control_vocabulary is None):
        raise UserError("give --sentences_file or --control_vocabulary: the checkpoint does not hold its signals")
    if (args.control_start_layer is None) != (args.control_end_layer is None):
        raise UserError("give --control_start_layer and --control_end_layer, or neither")
    if args.output_dir.exists():
        raise SettingError("--output_dir", f"{args.output_dir} exists; choose another")
    refuse_unwritable(args.output_dir, "--output_dir")
    base = resolve_pipeline_directory(args.base)
    index = read_model_index(base, expected="CogVideoXPipeline")
    sentences = read_sentences(args.sentences_file, "--sentences_file") if args.sentences_file else None
    layers = None if args.control_end_layer is None else (args.control_start_layer, args.control_end_layer)
    parts = {}
    if args.stage in SCHEDULERS:
        parts["scheduler"] = SCHEDULERS[args.stage].from_config(
            load_component(base, "scheduler").config,
            num_noise_groups=args.num_noise_groups,
            frames_per_group=args.frames_per_group,
        )
    base_config = component_config(base, "transformer", index)[1]
    dtype = DTYPES[args.dtype] if args.dtype else None
    parts["transformer"] = load_published_transformer(args.checkpoint, base_config, layers, dtype)
    if sentences is None:
        parts["control_vocabulary"] = ControlVocabulary.from_pretrained(args.control_vocabulary)
    else:
        parts["control_vocabulary"] = ControlVocabulary.from_clip(sentences, args.control_text_encoder)
    wanted, made = parts["transformer"].config.control_dim, parts["control_vocabulary"].control_dim
    if wanted != made:
        source = args.control_vocabulary or args.control_text_encoder
        raise UserError(f"{args.checkpoint} takes signals of {wanted} numbers (its control_dim); {source} makes {made}")
    write_pipeline(args.output_dir, base, PIPELINES[args.stage], parts)
    config = parts["transformer"].config
    print(
        f"{args.output_dir}: stage {args.stage}, control after layers {config.control_start_layer} to "
        f"{config.control_end_layer - 1}, {config.control_attention}"
    )


if __name__ == "__main__":
    run_cli(main)
