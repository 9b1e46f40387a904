"""Writes a LoRA under the names that another program reads; the strength it was trained at goes with it.

    python -m common.tools.convert_lora --lora_path outputs/stage1 --form comfyui --output game.safetensors

Forms: "diffusers" (what stage 1 writes; alpha in the metadata, which diffusers reads since 0.34), "comfyui" (ComfyUI's
own CogVideoX) and "comfyui-wrapper" (kijai's ComfyUI-CogVideoXWrapper). Any of them is read too; converting
there and back gives the same factors and the same strength. `--keep 0.99` makes a LoRA smaller: of what it adds to a
layer it keeps that share, by the squares of its singular values.
"""

from pathlib import Path

from common.cogvideox.lora import cut_lora, find_lora_file, read_lora, write_lora
from common.cogvideox.lora_names import FORMS
from common.config.command_line import ArgumentParser, fraction, refuse_unwritable
from common.config.errors import UserError, run_cli
from common.tools.fuse_lora_weights import add_lora_option


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--lora_path", required=True, help="stage 1's output_dir, or a LoRA file in any of the forms")
    parser.add_argument("--form", choices=FORMS, required=True, help="the names to write")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--keep", type=fraction, metavar="SHARE", help="a smaller LoRA: the share to keep, up to 1")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_lora_option(parser)
    args = parser.parse_args()
    if args.output.suffix != ".safetensors" or args.output.is_dir():
        raise UserError(f"--output {args.output}: give a file whose name ends in .safetensors")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {args.output} exists; give another name, or --overwrite")
    refuse_unwritable(args.output.parent, "--output")
    lora = read_lora(find_lora_file(args.lora_path), args.lora_alpha)
    if args.keep is not None:
        lora = cut_lora(lora, args.keep)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_lora(args.output, lora, args.form)
    scalings = sorted({lora.scaling(layer) for layer in lora.factors})
    ranks = sorted({len(a) for a, _ in lora.factors.values()})
    ranks = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"{args.output}: {len(lora.factors)} layers, {ranks}, alpha/rank {scalings}, as {args.form}")


if __name__ == "__main__":
    run_cli(main)
