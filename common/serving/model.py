"""What the player plays: a streaming pipeline, its sizes and signals, and the streams that it opens.

What is asked for is checked, and everything that clients are told about the model is read, before the weights are.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.cogvideox.loading import device_and_dtype, load_streaming_scheduler, picture_size
from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline
from common.cogvideox.pipeline_io import load_component, read_model_index
from common.cogvideox.speed import SpeedOptions, check_speed_options, speed_up
from common.cogvideox.streaming import VideoStream
from common.cogvideox.window_scheduler import SwinSchedulerMixin
from common.config.errors import UserError
from common.config.model_directory import resolve_pipeline_directory
from common.config.settings import SIZE_MULTIPLE, VAE_TIME_FACTOR
from common.data.fingerprint import VideoStamp, component_digest, pipeline_digests
from common.data.video import read_clip
from common.serving.protocol import NULL_SIGNAL, ControlLog

FROM_TEXT = "text"
MAX_CLIPS = 64
Progress = Callable[[float, str], None]


class TextEmbeds(NamedTuple):
    """A prompt and the negative prompt, each [1,L,text_embed_dim] in host memory."""

    prompt: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Start:
    """What fixes a new stream: prompt, seed, where it begins, and the log to follow if it is a replay."""

    prompt: str
    seed: int
    start: str = FROM_TEXT
    log: ControlLog | None = None


@dataclass(frozen=True)
class ModelOptions:
    """Where the model is and how to run it; None leaves a choice to the model."""

    model_path: str
    device: str | None = None
    dtype: str | None = None
    frames_per_group: int | None = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    control_guidance_scale: float = 1.0
    height: int | None = None
    width: int | None = None
    fps: float = 16.0
    clips: Path | None = None
    speed: SpeedOptions = SpeedOptions()


@dataclass(frozen=True)
class ModelInfo:
    """What clients are told before the weights are there. `signals` are the vocabulary's names in order, `settings`
    what `settings_of` makes of the options."""

    name: str
    signals: list[str]
    height: int
    width: int
    fps: float
    frames_per_chunk: int
    settings: str = ""
    clips: dict[str, Path] = field(default_factory=dict)

    @property
    def neutral(self) -> str | None:
        """The command while nobody drives."""
        return "N" if "N" in self.signals else None

    def index(self, signal: str | None) -> int:
        return NULL_SIGNAL if signal is None else self.signals.index(signal)

    def settings_from(self, start: str) -> str:
        """`settings` of a stream that begins there: of a clip its content counts, and the rate at which it is read."""
        if start == FROM_TEXT:
            return self.settings
        stamp = VideoStamp.of(self.clips[start])
        return f"{self.settings} fps={self.fps} clip={stamp.digest if stamp else 'gone'}"


def scheduler_of(options: ModelOptions) -> SwinSchedulerMixin:
    return load_streaming_scheduler(
        options.model_path,
        options.frames_per_group,
        options.num_inference_steps,
        options.guidance_scale,
        options.control_guidance_scale,
    )


def find_clips(directory: Path | None) -> dict[str, Path]:
    """Name → file of the videos to start from. Clients choose among the names; they never name a file."""
    if directory is None:
        return {}
    if not directory.is_dir():
        raise UserError(f"--clips {directory}: there is no such directory")
    clips = {path.stem[:100]: path for path in sorted(directory.glob("*.mp4")) if path.stem != FROM_TEXT}
    if not clips:
        raise UserError(f"--clips {directory}: holds no .mp4 file")
    return dict(list(clips.items())[:MAX_CLIPS])


def settings_of(
    options: ModelOptions, directory: Path, index: dict[str, Any], height: int, width: int, frames_per_group: int
) -> str:
    """All that a stream's frames depend on besides where it starts and what its control log says, as "name=value
    name=value …".

    The model is known by the content of all its components: one that was trained anew has kept its name. Of a file over
    1 GiB, as CogVideoX-2B's transformer, a sample is read in half a second.
    """
    device, dtype = device_and_dtype(options.device, options.dtype)
    speed = options.speed
    decode_type = torch.device(speed.decode_device or device).type
    told = {
        "size": f"{width}x{height}",
        "frames_per_group": frames_per_group,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "control_guidance_scale": options.control_guidance_scale,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "compile": "on" if speed.compile else None,
        "float8": "on" if speed.float8 else None,
        "attention_backend": speed.attention_backend,
        "light_decoder": speed.light_decoder and component_digest(speed.light_decoder),
        "decode_device": None if decode_type == device.type else decode_type,  # cuda:1 decodes as cuda does
        **pipeline_digests(directory, index),
    }
    # A class stands before its digest with a colon: spaces part the settings.
    return " ".join(f"{name}={value}".replace(" ", ":") for name, value in told.items() if value is not None)


def inspect_model(options: ModelOptions) -> ModelInfo:
    """Reads all but the weights, of which only a hash is taken; what does not fit together is a `UserError` now."""
    directory = resolve_pipeline_directory(options.model_path)
    index = read_model_index(directory, expected="CogVideoXStreamingPipeline")
    check_speed_options(options.speed, *device_and_dtype(options.device, options.dtype))
    scheduler = scheduler_of(options)
    height, width = picture_size(directory, index, options.height, options.width)
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise UserError(f"--height {height} --width {width}: use multiples of {SIZE_MULTIPLE}")
    signals = list(load_component(directory, "control_vocabulary").names) if index.get("control_vocabulary") else []
    width_of_group = scheduler.config.frames_per_group
    return ModelInfo(
        name=directory.resolve().name[:100],
        signals=signals,
        height=height,
        width=width,
        fps=options.fps,
        frames_per_chunk=width_of_group * VAE_TIME_FACTOR,
        settings=settings_of(options, directory, index, height, width, width_of_group),
        clips=find_clips(options.clips),
    )


class WorldModel:
    """A pipeline on its device. Made, and its streams advanced, by one thread; `encode` by any."""

    def __init__(self, pipeline: CogVideoXStreamingPipeline, options: ModelOptions, info: ModelInfo):
        self.pipeline, self.options, self.info = pipeline, options, info
        self._tokenizer_lock = threading.Lock()  # tokenizers keep their padding as state: two calls at once mix it up

    @classmethod
    def load(cls, options: ModelOptions, info: ModelInfo, progress: Progress) -> "WorldModel":
        progress(0.05, "reading the model's weights")
        device, dtype = device_and_dtype(options.device, options.dtype)
        pipeline = CogVideoXStreamingPipeline.from_pretrained(
            options.model_path, torch_dtype=dtype, scheduler=scheduler_of(options)
        )
        progress(0.5, f"moving the model to {device.type}")
        pipeline = pipeline.to(device)
        model = cls(pipeline, options, info)
        speed_up(pipeline, options.speed)
        if options.speed.compile:
            model._warm_up(progress)
        return model

    def _warm_up(self, progress: Progress) -> None:
        """Runs a stream far enough to meet, and so compile, all that any stream calls."""
        progress(0.55, "compiling the model; the first start takes a minute or two")
        stream = self.open(Start(prompt="", seed=0), self.encode(""), lambda: NULL_SIGNAL)
        for share in (0.8, 0.9):
            next(stream)
            progress(share, "compiling the model")

    @torch.no_grad()
    def encode(self, prompt: str) -> TextEmbeds:
        """Through host memory, so that threads (and streams of a GPU) share nothing that one of them could free."""
        length = self.pipeline.transformer.config.max_text_seq_length
        device = self.pipeline.device
        with self._tokenizer_lock:
            embeds = self.pipeline.encode_prompt(prompt, "", max_sequence_length=length, device=device)
        return TextEmbeds(*(each.cpu() for each in embeds))

    def open(self, start: Start, embeds: TextEmbeds, control: Callable[[], Any]) -> VideoStream:
        """A new stream; `control` is asked once a shift, and returns a name or −1."""
        options, info = self.options, self.info
        init_video = None
        if start.start != FROM_TEXT:
            frames = VAE_TIME_FACTOR * (self.pipeline.scheduler.num_window_frames - 1) + 1
            init_video = read_clip(info.clips[start.start], frames, info.height, info.width, info.fps, from_end=True)
        device = self.pipeline.device
        return self.pipeline.stream(
            None,
            control if info.signals else None,
            init_video,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            control_guidance_scale=options.control_guidance_scale,
            prompt_embeds=embeds.prompt.to(device),
            negative_prompt_embeds=embeds.negative.to(device),
            height=info.height,
            width=info.width,
            seed=start.seed,
        )

    def memory_bytes(self) -> int:
        """What is held now: on the GPU, else resident in this process."""
        if self.pipeline.device.type == "cuda":
            return torch.cuda.memory_allocated(self.pipeline.device)
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().rss
