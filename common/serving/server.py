"""Serves a stage 3 or 4 model as a live, playable world.

    python -m common.serving.server --model_path outputs/miniworld/stage4

then open http://127.0.0.1:8000. The first visitor drives (arrow keys), others watch or wait for their turn. To let
other machines in, give --host 0.0.0.0 and a --token, and open http://…:8000/?token=… there.
"""

import argparse
import logging
import secrets
import signal
import socket
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from common.cogvideox.loading import COUNT, add_place_options, add_sampling_options
from common.cogvideox.speed import add_speed_options, speed_options
from common.config.command_line import ArgumentParser, not_negative_number, positive_number, whole_number
from common.config.errors import UserError, run_cli
from common.serving.app import create_app, is_loopback
from common.serving.model import ModelInfo, ModelOptions, Start, WorldModel, inspect_model
from common.serving.protocol import MAX_PROMPT_CHARS, MAX_REPLAY_BYTES, MAX_SEED
from common.serving.room import EXAMPLES, Room

logger = logging.getLogger(__name__)
MIN_TOKEN_CHARS = 12
# What the kernel holds back for a client that does not read: more only makes its picture older before frames drop.
SEND_BUFFER_BYTES = 256 * 1024
OUT_OF_MEMORY_HELP = "out of memory: lower --height and --width, or take --dtype bfloat16"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--model_path", required=True, help="pipeline directory of stage 3 or 4 (or hub id)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; by default this machine alone")
    parser.add_argument("--port", type=whole_number(0), default=8000, help="0 takes a free one")
    parser.add_argument("--token", help="what clients have to know; needed when --host lets other machines in")
    add_place_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--threads", type=COUNT, help="CPU threads; by default PyTorch's choice")
    add_speed_options(parser)
    parser.add_argument("--frames_per_group", type=COUNT, default=1, help="latent frames per shift; 1 reacts fastest")
    parser.add_argument("--guidance_scale", type=float, help="guidance on the prompt; by default none")
    parser.add_argument("--control_guidance_scale", type=float, default=1.0, help="guidance on control; 1 for none")
    parser.add_argument("--fps", type=positive_number, default=16.0, help="the model's frames per second")
    parser.add_argument(
        "--idle_seconds", type=not_negative_number, default=30.0, help="after which who waits may drive"
    )
    parser.add_argument("--seed", type=whole_number(0), default=42, help="of the first stream")
    parser.add_argument("--prompt", action="append", help="of the first stream; given again, further examples")
    parser.add_argument("--clips", type=Path, help="directory of .mp4 files to start from")
    args = parser.parse_args(words)
    check_access(args)
    if args.seed > MAX_SEED:
        raise UserError(f"--seed {args.seed}: {MAX_SEED} is the largest")
    if not all(0 < len(prompt) <= MAX_PROMPT_CHARS for prompt in args.prompt or []):
        raise UserError(f"--prompt: 1 to {MAX_PROMPT_CHARS} characters")
    return args


def check_access(args: argparse.Namespace) -> None:
    if args.token is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} can be reached by other machines: give a token as well, for example "
            f"--token {secrets.token_urlsafe(16)}"
        )
    if args.token is not None and len(args.token) < MIN_TOKEN_CHARS:
        raise UserError(f"--token: {MIN_TOKEN_CHARS} characters or more, or it could be guessed")


def listen(host: str, port: int) -> socket.socket:
    """The socket, bound; a `UserError` when that address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # every connection inherits it
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return listener


def make_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn with limits: nothing is logged that could hold a token, and nothing compressed that could be a bomb."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            ws="websockets-sansio",
            ws_max_size=MAX_REPLAY_BYTES + 1024,
            ws_per_message_deflate=False,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )


def make_app(options: ModelOptions, info: ModelInfo, args: argparse.Namespace) -> FastAPI:
    examples = tuple(args.prompt or EXAMPLES)
    start = Start(examples[0], args.seed)

    def make_room() -> Room:
        load = lambda progress: WorldModel.load(options, info, progress)  # noqa: E731
        return Room(info, load, start, args.idle_seconds, examples)

    return create_app(make_room, args.token)


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ModelOptions.__dataclass_fields__
    options = ModelOptions(
        **{name: value for name, value in vars(args).items() if name in names}, speed=speed_options(args)
    )
    info = inspect_model(options)
    listener = listen(args.host, args.port)
    # uvicorn stops cleanly at either signal and then raises it anew: to us that is the end, not an error.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    port, host = listener.getsockname()[1], f"[{args.host}]" if ":" in args.host else args.host
    logger.info("%s at http://%s:%d%s", info.name, host, port, "/?token=…" if args.token else "")
    make_server(make_app(options, info, args)).run(sockets=[listener])


if __name__ == "__main__":
    run_cli(main, OUT_OF_MEMORY_HELP)
