r"""Distils a light decoder from a pipeline's VAE, for streams whose pictures have to be ready in real time.

    python -m common.tools.distill_decoder --model_path data/miniworld/weights/base --data_root outputs/miniworld \
        --output_dir outputs/light_decoder --widths 128 64 32 --layers 2 2 2 --minutes 5

First encodes and decodes windows of the clips by the VAE, once, into a cache in the output directory (bounded by
--cache_gib, deleted at the end); then trains on random parts of them; then measures, on the last --num_heldout clips of
the index, PSNR against the VAE and against the video, and the time that both decoders take for a chunk of two latents.

Interrupted, the same command goes on: from the last window but 16 at most, and from the last checkpoint of the training
(Ctrl-C and SIGTERM write one first). With --steps a resumed run equals an unbroken one.

--output_dir gets config.json and weights as of any diffusers model, and report.json.

Shapes: B batch, F latent frames, C latent channels, H W latent height/width, N raw frames, h w pixels.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from tqdm import tqdm

from common.cogvideox.autoencoder import StreamingDecoder, encode_frames, latent_form
from common.cogvideox.light_decoder import LightStreamingDecoder, LightVideoDecoder, load_light_decoder
from common.cogvideox.loading import COUNT, PIXELS, add_place_options, device_and_dtype, picture_size
from common.cogvideox.pipeline_io import load_component, read_model_index
from common.config.command_line import (
    ArgumentParser,
    fraction,
    not_negative_number,
    positive_number,
    refuse_unwritable,
    whole_number,
)
from common.config.errors import UserError, run_cli
from common.config.files import replace_text
from common.config.model_directory import resolve_pipeline_directory
from common.config.settings import VAE_TIME_FACTOR, TrainingSettings
from common.data.buckets import Bucket, SampleKey
from common.data.dataset import VideoDataset
from common.data.fingerprint import component_digest, file_digest
from common.data.index import ClipRecord, read_index
from common.training.decoder_distillation import DecoderDistillation, DistillationPlan
from common.training.decoder_targets import DecoderTargets, choose_count, reconstruct
from common.training.interruption import StopRequest
from common.training.random import seed_everything

OUT_OF_MEMORY_HELP = "out of memory: lower --batch_size, --crop, --num_frames or --widths"

# These do not change what is learnt.
MAY_CHANGE = ("model_path", "data_root", "index_file", "output_dir", "device", "checkpointing_steps",
              "max_unreadable_share")  # fmt: skip

CHUNK = 2  # latents
TIMED_CHUNKS = 20


def psnr(frames: Tensor, target: Tensor) -> float:
    """dB, of pictures of about [−1,1] (peak to peak 2) cut to it, as they are when they are shown."""
    error = (frames.float().clamp(-1, 1) - target.clamp(-1, 1)).square().mean().clamp_min(1e-10)
    return (20 * np.log10(2) - 10 * torch.log10(error)).item()


@torch.no_grad()
def quality(light: LightVideoDecoder, vae: AutoencoderKLCogVideoX, videos: VideoDataset) -> dict[str, float]:
    """Mean PSNR over the first window of every clip."""
    values: dict[str, list[float]] = {"psnr_to_vae": [], "psnr_to_video": [], "vae_psnr_to_video": []}
    for number in tqdm(range(len(videos)), desc="held-out clips", unit="clip"):
        pixels = videos[SampleKey(number, 0, 0)]["pixel_values"][None]  # uint8 [1,N,3,h,w]
        latents, by_vae = reconstruct(vae, pixels)
        by_light = LightStreamingDecoder(light).decode(latents)
        video = pixels.to(by_vae.device).float() / 127.5 - 1
        values["psnr_to_vae"].append(psnr(by_light, by_vae))
        values["psnr_to_video"].append(psnr(by_light, video))
        values["vae_psnr_to_video"].append(psnr(by_vae, video))
    return {name: round(statistics.mean(column), 3) for name, column in values.items()}


def milliseconds(decoder: LightStreamingDecoder | StreamingDecoder, latents: Tensor) -> float:
    """Median time of a chunk of two latents in a running stream; `latents` [1,F,C,H,W], F ≥ 3."""

    def wait() -> float:
        if latents.device.type == "cuda":
            torch.cuda.synchronize(latents.device)
        return time.perf_counter()

    chunk = latents[:, 1 : 1 + CHUNK]
    for first in (latents[:, :1], chunk, chunk):
        decoder.decode(first)
    times = []
    for _ in range(TIMED_CHUNKS):
        started = wait()
        decoder.decode(chunk)
        times.append(1000 * (wait() - started))
    return round(statistics.median(times), 3)


def measure(light: LightVideoDecoder, vae: AutoencoderKLCogVideoX, videos: VideoDataset) -> dict[str, Any]:
    """What the report says of a finished decoder, in the type in which it would be used."""
    pixels = videos[SampleKey(0, 0, 0)]["pixel_values"][None]
    latents = encode_frames(vae, pixels)
    return {
        **quality(light, vae, videos),
        "parameters": sum(p.numel() for p in light.parameters()),
        "vae_decoder_parameters": sum(p.numel() for p in vae.decoder.parameters()),
        "milliseconds": milliseconds(LightStreamingDecoder(light), latents),
        "vae_milliseconds": milliseconds(StreamingDecoder(vae), latents),
        "frames_timed": CHUNK * VAE_TIME_FACTOR,
        "height": pixels.shape[-2],
        "width": pixels.shape[-1],
        "heldout_clips": len(videos),
        "device": torch.cuda.get_device_name(vae.device) if vae.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(vae.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    rows = [f"{'':<16}{'light decoder':>14}{'VAE':>12}"]
    for label, names, form in (
        ("PSNR to the VAE", ("psnr_to_vae", ""), ".2f"),
        ("PSNR to video", ("psnr_to_video", "vae_psnr_to_video"), ".2f"),
        (f"ms, {report['frames_timed']} frames", ("milliseconds", "vae_milliseconds"), ".1f"),
        ("parameters", ("parameters", "vae_decoder_parameters"), ",d"),
    ):
        light, vae = (format(report[name], form) if name else "" for name in names)
        rows.append(f"{label:<16}{light:>14}{vae:>12}")
    place = f"{report['device']}, {report['threads']} CPU threads, {report['dtype']}"
    rows.append(f"{report['heldout_clips']} held-out clips, {report['width']}×{report['height']}; {place}")
    return "\n".join(rows)


def read_clips(args: argparse.Namespace) -> tuple[list[ClipRecord], list[ClipRecord]]:
    """Those to train on and those held out, the index's last."""
    records = read_index(args.index_file, args.data_root, needs_control=False)
    if len(records) <= args.num_heldout:
        raise UserError(
            f"{args.index_file} has {len(records)} clips; --num_heldout {args.num_heldout} leaves none to train on"
        )
    return records[: -args.num_heldout], records[-args.num_heldout :]


def settings_of(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything that the result depends on; paths are in it by what they hold."""
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    return settings | {"vae": component_digest(directory / "vae"), "index": file_digest(args.index_file)}


def check_same_run(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The report when the run is finished; otherwise notes the settings for the next time. UserError when the
    directory was begun with other settings."""
    stamp, report = args.output_dir / ".partial" / "settings.json", args.output_dir / "report.json"
    finished = json.loads(report.read_text()) if report.exists() else None
    found = finished["settings"] if finished else json.loads(stamp.read_text()) if stamp.exists() else settings
    changed = [f"{name} {found.get(name)} -> {value}" for name, value in settings.items() if found.get(name) != value]
    if changed:
        raise UserError(
            f"--output_dir {args.output_dir} was begun with other settings ({', '.join(changed)}); give those, or "
            "another directory, or delete that one"
        )
    if finished is None:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        replace_text(stamp, json.dumps(settings, indent=1) + "\n")
    return finished


def distill(args: argparse.Namespace) -> dict[str, Any] | None:
    """Makes what is missing of the decoder in args.output_dir; → the report, or None if asked to stop before."""
    directory = resolve_pipeline_directory(args.model_path)
    index = read_model_index(directory)
    device, dtype = device_and_dtype(args.device, args.dtype)
    args.height, args.width = picture_size(directory, index, args.height, args.width)
    args.index_file = args.index_file or args.data_root / "index.json"
    train, heldout = read_clips(args)
    refuse_unwritable(args.output_dir, "--output_dir")
    bucket = Bucket(args.num_frames, args.height, args.width)
    options = {name: getattr(args, name) for name in ("fps", "seed", "max_unreadable_share")}
    videos, heldout_videos = (VideoDataset(part, [bucket], **options) for part in (train, heldout))
    args.dtype = str(dtype).removeprefix("torch.")
    vae = load_component(directory, "vae", dtype, index).to(device)
    form = latent_form(vae)
    seed_everything(args.seed)
    try:
        sizes = {name: tuple(getattr(args, name)) for name in ("widths", "layers", "memory_layers")}
        light = LightVideoDecoder.for_vae(vae, **sizes).to(device)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    count = choose_count(args.windows_per_clip * len(train), bucket, *form, args.cache_gib)
    finished = check_same_run(args, settings_of(args, directory))
    if finished:
        print(f"{args.output_dir} is complete; nothing to do")
        return finished
    torch.backends.cudnn.benchmark = True  # shapes never change
    plan = DistillationPlan(
        args.steps if not args.minutes else 0, args.minutes, args.batch_size, args.crop or None, args.learning_rate,
        args.weight_decay, device.type == "cuda", args.checkpointing_steps, args.seed,
    )  # fmt: skip
    partial = args.output_dir / ".partial"
    with StopRequest() as stop:
        distillation = train_on_windows(light, vae, DecoderTargets(partial, videos, count, *form), plan, partial, stop)
    if distillation is None:
        return None
    publish(distillation.module, partial / "model", args.output_dir)
    light = load_light_decoder(args.output_dir, vae, dtype).to(device)
    steps = {"steps": distillation.step, "training_seconds": round(distillation.seconds, 1), "windows": count}
    report = steps | measure(light, vae, heldout_videos) | {"settings": settings_of(args, directory)}
    replace_text(args.output_dir / "report.json", json.dumps(report, indent=1) + "\n")  # last: marks it complete
    shutil.rmtree(partial)
    return report


def train_on_windows(
    light: LightVideoDecoder,
    vae: AutoencoderKLCogVideoX,
    targets: DecoderTargets,
    plan: DistillationPlan,
    partial: Path,
    stop: StopRequest,
) -> DecoderDistillation | None:
    """Fills the cache and trains; None if asked to stop before the end."""
    light.to(memory_format=torch.channels_last)
    distillation = DecoderDistillation(light, plan, partial / "checkpoint.pt")
    with tqdm(total=targets.count, desc="windows by the VAE") as bar:
        if not targets.fill(vae, stop, bar.update):
            return None
    bar_format = "{desc} {percentage:5.1f}% |{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=1000, desc="training", bar_format=bar_format) as bar:

        def show(progress: float, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(int(1000 * progress) - bar.n)

        return distillation if distillation.train(targets, stop, show) else None


def publish(light: LightVideoDecoder, beside: Path, output_dir: Path) -> None:
    """Saves the decoder as a diffusers model; each file appears whole."""
    light.save_pretrained(beside)
    for path in sorted(beside.iterdir(), reverse=True):  # config.json after the weights
        os.replace(path, output_dir / path.name)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="pipeline directory (or hub id) whose VAE is the teacher")
    add("--data_root", type=Path, required=True, help="folder that the index's paths start from")
    add("--index_file", type=Path, help="index of the clips; by default index.json in data_root")
    add("--output_dir", type=Path, required=True, help="directory to make, of a light decoder and its report")
    add("--widths", type=whole_number(8, step=8), nargs="+", default=[512, 256, 64], help="channels by resolution")
    add("--layers", type=COUNT, nargs="+", default=[3, 3, 3], help="blocks by resolution")
    add("--memory_layers", type=whole_number(0), nargs="+", default=[3, 3, 0], help="those of them that remember")
    add("--steps", type=COUNT, default=20000, help="training steps")
    add("--minutes", type=not_negative_number, default=0.0, help="minutes of training; when given, not the steps")
    add("--batch_size", type=COUNT, default=8)
    add("--crop", type=whole_number(0), default=32, help="latents to a side of what a sample shows; 0: whole pictures")
    add("--learning_rate", type=positive_number, default=2e-3, help="peak; after it a cosine to zero")
    add("--weight_decay", type=not_negative_number, default=0.0)
    frames = whole_number(2 * CHUNK * VAE_TIME_FACTOR + 1, step=VAE_TIME_FACTOR)
    add("--num_frames", type=frames, default=33, help="raw frames of a window, 4n+1")
    add("--height", type=PIXELS, help="pixels, a multiple of 16; by default the model's")
    add("--width", type=PIXELS, help="pixels, a multiple of 16; by default the model's")
    add("--fps", type=COUNT, default=16, help="frames per second of the windows")
    add("--windows_per_clip", type=COUNT, default=1, help="windows of each clip, as far as --cache_gib allows")
    add("--cache_gib", type=positive_number, default=32.0, help="disk for what the VAE makes of the windows")
    add("--num_heldout", type=COUNT, default=8, help="clips at the end of the index, kept for measuring")
    add("--max_unreadable_share", type=fraction, default=TrainingSettings.max_unreadable_share, help="more stop a run")
    add("--checkpointing_steps", type=COUNT, default=500, help="what a killed run loses at most")
    add("--seed", type=whole_number(0), default=0)
    add_place_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    report = distill(args)
    if report is None:
        print("stopped and saved; the same command goes on")
        return
    print(table(report))
    print(f"{args.output_dir}: light decoder and report.json")


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
