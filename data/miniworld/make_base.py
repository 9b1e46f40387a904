r"""Trains the mini base model: a complete diffusers CogVideoX pipeline directory, small enough for a laptop's CPU.

    python -m data.miniworld.make_base --data_root outputs/miniworld --output_dir outputs/miniworld/base

is made for two CPU cores: 3.5 minutes of training for the video autoencoder (the picture quality of everything later
rests on it; about 22 dB), then 150 steps for a text-to-video transformer that knows what the world looks like. How it
is trained at length on a GPU, with --patch_size 1, is in scripts/train_miniworld.sh, and how the shipped one was made
in data/miniworld/weights/README.md.

The tokenizer is trained on the captions, the text encoder is random and frozen, the scheduler is CogVideoX-2B's, or
5B's with --snr_shift_scale 1. Finished parts are kept, and a run that was killed goes on from a checkpoint at most a
minute old. With --vae_steps the weights depend on the settings alone; with --vae_minutes also on how fast the machine
is.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import T5EncoderModel, T5Tokenizer

from common.cogvideox.loading import device_and_dtype
from common.cogvideox.model_sizes import SIZES
from common.cogvideox.rotary import rotary_positional_embeddings
from common.config.command_line import (
    ArgumentParser,
    not_negative_number,
    positive_number,
    refuse_unwritable,
    whole_number,
)
from common.config.errors import UserError, run_cli
from common.config.files import replacing
from common.config.settings import VAE_TIME_FACTOR
from common.data.index import ClipRecord, read_index
from common.training.encoding import encode_prompts
from common.training.muon import MuonAdamW
from data.miniworld import base_text, base_transformer, base_vae
from data.miniworld.base_training import Budget, Workplace, fit
from data.miniworld.clips import decode_clips

OUT_OF_MEMORY_HELP = (
    "out of memory: lower --vae_batch_size, --vae_image_batch_size, --transformer_batch_size, --max_clips"
)


def read_records(index: Path, args: argparse.Namespace) -> list[ClipRecord]:
    """The first --max_clips clips of an index."""
    records = read_index(index, args.data_root, needs_control=False)[: args.max_clips or None]
    if len(records) <= args.num_heldout:
        raise UserError(f"{index} has {len(records)} clips; --num_heldout {args.num_heldout} leaves none to train on")
    return records


def make_text(place: Workplace, captions: list[str], seed: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """Tokenizer and text encoder, trained or drawn now or loaded from an earlier run."""
    if not place.has("tokenizer"):
        place.finish("tokenizer", base_text.train_tokenizer(captions).save_pretrained)
    tokenizer = T5Tokenizer.from_pretrained(place.output_dir / "tokenizer")
    if not place.has("text_encoder"):
        place.finish("text_encoder", base_text.make_text_encoder(len(tokenizer), seed).save_pretrained)
    return tokenizer, T5EncoderModel.from_pretrained(place.output_dir / "text_encoder").eval()


def make_vae(
    place: Workplace, clips: list[Tensor], further: list[Tensor], args: argparse.Namespace
) -> AutoencoderKLCogVideoX:
    """The VAE, trained on all clips but the last of either list; its scaling_factor suits `clips`."""
    device = torch.device(args.device)
    if not place.has("vae"):
        torch.manual_seed(args.seed)
        if args.init_vae:
            vae = AutoencoderKLCogVideoX.from_pretrained(args.init_vae, torch_dtype=torch.float32).to(device)
        else:
            vae = base_vae.make_vae(args.height, args.width, tuple(args.vae_channels), args.latent_channels).to(device)
        train, more = clips[: -args.num_heldout], further[: -args.num_heldout]
        windows = base_vae.Windows(train + more, args.seed)
        batches = base_vae.vae_batches(
            vae, windows, args.vae_image_share, args.vae_batch_size, args.vae_image_batch_size
        )
        loss = partial(base_vae.vae_loss, vae, autocast_of(args))
        budget = Budget(args.vae_steps, 0.0 if args.vae_steps else args.vae_minutes)
        optimizer = make_optimizer(vae, args.vae_learning_rate)
        steps = fit(vae, optimizer, batches, loss, budget, place.partial / "vae.pt", "VAE")
        heldout = [part[-args.num_heldout :] for part in (clips, further) if part]
        psnr = [round(base_vae.reconstruction_psnr(vae, part), 3) for part in heldout]
        print(f"VAE: {steps} steps, {psnr} dB on {args.num_heldout} held-out clips of each index")
        windows = base_vae.Windows(train, args.seed)
        moments, _ = base_vae.encode_windows(vae, windows, min(64, len(train)), args.num_frames, lambda _: None)
        vae.register_to_config(scaling_factor=base_vae.measured_scaling_factor(moments))
        place.note(vae_steps_done=steps, vae_psnr=psnr)
        place.finish("vae", vae.save_pretrained)
    return AutoencoderKLCogVideoX.from_pretrained(place.output_dir / "vae").to(device).eval()


def encode_clips(
    place: Workplace, vae: AutoencoderKLCogVideoX, clips: list[Tensor], args: argparse.Namespace
) -> dict[str, Tensor]:
    """Latent moments of the transformer's training windows, encoded once."""
    path = place.partial / "latents.pt"
    if not path.exists():
        windows = base_vae.Windows(clips[: -args.num_heldout], args.seed)
        with tqdm(total=args.transformer_windows, desc="encoding windows", unit="window") as bar:
            moments, clip_numbers = base_vae.encode_windows(
                vae, windows, args.transformer_windows, args.num_frames, bar.update
            )
        with replacing(path) as beside:
            torch.save({"moments": moments, "clip_numbers": clip_numbers}, beside)
    return torch.load(path, map_location=args.device, weights_only=True)


def make_transformer(
    place: Workplace, vae: AutoencoderKLCogVideoX, clips: list[Tensor], text: Tensor, args: argparse.Namespace
) -> CogVideoXTransformer3DModel:
    """The trained transformer; `text` [clips + 1, L, D] are the embeddings of every clip's caption and, last, of ""."""
    if not place.has("transformer"):
        latents = encode_clips(place, vae, clips, args)
        torch.manual_seed(args.seed)
        transformer = base_transformer.make_transformer(
            vae, args.num_frames, args.patch_size, args.num_layers, args.num_heads, args.positions == "rotary"
        ).to(args.device)
        if args.compile:
            transformer.compile()
        windows = base_transformer.LatentWindows(
            **latents, prompt_embeds=text[:-1], null_embeds=text[-1:], scaling_factor=vae.config.scaling_factor
        )
        scheduler = scheduler_of(args)
        batches = windows.batches(args.transformer_batch_size, scheduler.config.num_train_timesteps, args.seed)
        latent_shape = latents["moments"].transpose(1, 2).shape  # [n, F, 2C, H, W]
        loss = partial(
            base_transformer.v_loss, transformer,
            rotary_positional_embeddings(transformer.config, latent_shape, torch.device(args.device)),
            scheduler.alphas_cumprod.to(args.device), autocast_of(args),
        )  # fmt: skip
        optimizer = make_optimizer(transformer, args.transformer_learning_rate)
        checkpoint = place.partial / "transformer.pt"
        budget = Budget(0 if args.transformer_minutes else args.transformer_steps, args.transformer_minutes)
        steps = fit(transformer, optimizer, batches, loss, budget, checkpoint, "transformer")
        place.note(transformer_steps_done=steps)
        place.finish("transformer", transformer.save_pretrained)
    return CogVideoXTransformer3DModel.from_pretrained(place.output_dir / "transformer")


def scheduler_of(args: argparse.Namespace) -> CogVideoXDDIMScheduler:
    return replace(SIZES["mini"], snr_shift_scale=args.snr_shift_scale).scheduler()


def make_optimizer(model: nn.Module, learning_rate: float) -> MuonAdamW:
    on_gpu = next(model.parameters()).device.type == "cuda"
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True, "capturable": on_gpu}
    return MuonAdamW(list(model.parameters()), lr=learning_rate, **options)


def autocast_of(args: argparse.Namespace) -> Callable[[], torch.autocast]:
    kind = torch.device(args.device).type
    return partial(torch.autocast, kind, dtype=torch.bfloat16, enabled=args.mixed_precision == "bf16")


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of handing each large one back to the system.

    A training step on the CPU frees and asks again for the same few hundred megabytes; without this, a quarter of the
    time goes into mapping them anew.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: only slower
        return


def make_base(args: argparse.Namespace) -> Path:
    """Makes what is missing of the pipeline in args.output_dir; returns that directory."""
    check_arguments(args)
    records = read_records(args.index_file or args.data_root / "index.json", args)
    further = read_records(args.vae_index_file, args) if args.vae_index_file else []
    place = Workplace(args)
    if (args.output_dir / "model_index.json").exists():
        print(f"{args.output_dir} is complete; nothing to do")
        return args.output_dir
    tokenizer, text_encoder = make_text(place, [record.caption for record in records + further], args.seed)
    clips, further_clips = (  # decoded once and kept in memory: about 2 MB a clip of six seconds
        [clip.to(args.device) for clip in decode_clips(part, args.num_frames, args.height, args.width)]
        for part in (records, further)
    )
    vae = make_vae(place, clips, further_clips, args)
    captions = [*(record.caption for record in records), ""]
    text = encode_prompts(tokenizer, text_encoder, captions, base_text.MAX_TEXT_LENGTH).to(args.device)
    transformer = make_transformer(place, vae, clips, text, args)
    pipeline = CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler_of(args))
    place.finish("scheduler", pipeline.scheduler.save_pretrained)
    pipeline.save_config(place.partial)
    os.replace(place.partial / "model_index.json", args.output_dir / "model_index.json")  # last: marks it complete
    shutil.rmtree(place.partial)
    return args.output_dir


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses impossible settings before anything is read."""
    if args.num_frames % VAE_TIME_FACTOR != 1 or args.num_frames < base_vae.VIDEO_FRAMES:
        raise UserError(f"--num_frames {args.num_frames}: use 4n+1 frames, at least {base_vae.VIDEO_FRAMES}")
    if args.height % 16 or args.width % 16 or min(args.height, args.width) < 16:
        raise UserError(f"--height {args.height} --width {args.width}: both have to be multiples of 16")
    batches = ("vae_batch_size", "vae_image_batch_size", "transformer_batch_size")
    for name in (*batches, "transformer_windows", "num_heldout", "num_layers", "num_heads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: has to be at least 1")
    if len(args.vae_channels) not in (3, 4) or any(channels < 8 or channels % 8 for channels in args.vae_channels):
        raise UserError(f"--vae_channels {args.vae_channels}: give three or four multiples of 8, one a resolution")
    if 2 ** (len(args.vae_channels) - 1) * args.patch_size not in (8, 16):
        raise UserError(f"--patch_size {args.patch_size}: a patch has to cover 8 or 16 pixels")
    device_and_dtype(args.device, None)
    refuse_unwritable(args.output_dir, "--output_dir")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_root", type=Path, required=True, help="folder that the index's paths start from")
    add("--index_file", type=Path, default=None, help="index of the clips; default: index.json in data_root")
    add("--output_dir", type=Path, required=True, help="the pipeline directory to make")
    add("--max_clips", type=whole_number(0), default=0, help="use only the first clips of the index; 0: all")
    add("--num_heldout", type=int, default=4, help="clips at the end of the index kept for measuring the VAE")
    add("--num_frames", type=int, default=33, help="raw frames of the transformer's windows, 4n+1")
    add("--height", type=int, default=64, help="pixels, a multiple of 16; clips are resized and cropped to it")
    add("--width", type=int, default=96, help="pixels, a multiple of 16")
    add("--vae_index_file", type=Path, default=None, help="further clips, from which the VAE alone learns")
    add("--init_vae", type=Path, default=None, help="directory of a VAE to go on from; with --vae_minutes 0 it stays")
    add("--vae_minutes", type=not_negative_number, default=3.5, help="minutes of VAE training")
    add("--vae_steps", type=whole_number(0), default=0, help="VAE steps; when given, --vae_minutes does not count")
    add("--vae_image_share", type=float, default=0.6, help="share of VAE training on single frames, at its start")
    add("--vae_channels", type=int, nargs="+", default=list(base_vae.BLOCK_CHANNELS), help="width of each resolution")
    add("--latent_channels", type=whole_number(1), default=base_vae.LATENT_CHANNELS)
    add("--vae_batch_size", type=int, default=2, help="9-frame clips a step")
    add("--vae_image_batch_size", type=int, default=2, help="single frames a step")
    add("--vae_learning_rate", type=float, default=2e-3, help="peak")
    add("--transformer_steps", type=whole_number(1), default=150)
    add("--transformer_minutes", type=not_negative_number, default=0.0, help="when given, in the place of the steps")
    add("--transformer_batch_size", type=int, default=4)
    add("--transformer_windows", type=int, default=120, help="windows encoded once for the transformer")
    add("--transformer_learning_rate", type=float, default=1e-3, help="peak")
    add("--patch_size", type=whole_number(1), default=2, help="latents to a side of a transformer token")
    add("--num_layers", type=int, default=6, help="transformer layers")
    add("--num_heads", type=int, default=3, help="attention heads, 64 wide each")
    add("--positions", choices=["sincos", "rotary"], default="sincos", help="as CogVideoX-2B has them, or as 5B")
    add("--snr_shift_scale", type=positive_number, default=3.0, help="of the noise schedule: 2B has 3, 5B has 1")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16: autocast, for GPUs")
    add("--compile", action="store_true", help="torch.compile for the transformer; pays off from hundreds of steps")
    add("--seed", type=whole_number(0), default=0)
    return parser.parse_args(argv)


def main() -> None:
    keep_freed_memory()
    path = make_base(parse_arguments())
    print(f"base model: {path}")


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
