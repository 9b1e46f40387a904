"""What server and clients say to each other: JSON texts both ways, and frames as binary messages.

Client to server, one JSON object each: see `ClientMessage`. Server to client: welcome, status, stats, recording, pong
and error, JSON objects with "type"; and frames, `HEADER` followed by a JPEG.
"""

import json
import struct
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from common.config.errors import UserError, one_line

VERSION = 1
MAX_MESSAGE_BYTES = 4 * 1024
MAX_REPLAY_BYTES = 256 * 1024
MAX_PROMPT_CHARS = 1000
MAX_SEED = 2**53 - 1  # the largest whole number that JavaScript writes exactly
MAX_SHIFTS, MAX_CHANGES, MAX_PROMPT_CHANGES = 1_000_000, 10_000, 64
NULL_SIGNAL = -1

# Little-endian: version, index of the signal (−1: none), flags, 0, number of the frame, newest signal id that the
# shift which made the frame had read, number of the stream.
HEADER = struct.Struct("<BbBBIII")
FIRST_OF_STREAM = 1

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Shift = Annotated[int, Field(ge=0, le=MAX_SHIFTS)]
Milliseconds = Annotated[float, Field(ge=0, le=1e16)]


class ProtocolError(UserError):
    """A message that breaks the protocol; its one line is what the client is told."""


class Message(BaseModel):
    """Strict: no conversion of types, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Signal(Message):
    """The driver holds this command from now on. `id` rises from message to message, `time` is the client's clock."""

    type: Literal["signal"]
    signal: Name
    id: Annotated[int, Field(ge=0, lt=2**32)]
    time: Milliseconds = 0.0


class ChangePrompt(Message):
    """Another prompt, in the running stream."""

    type: Literal["prompt"]
    prompt: Prompt


class Reset(Message):
    """A new stream; what is left out stays as it was."""

    type: Literal["reset"]
    prompt: Prompt | None = None
    seed: Seed | None = None
    start: Name | None = None  # "text" or one of welcome.clips


class Pause(Message):
    type: Literal["pause"]
    paused: bool


class Wheel(Message):
    """Asks to drive (and waits in the queue), or gives the wheel or the place in the queue back."""

    type: Literal["wheel"]
    take: bool


class Record(Message):
    type: Literal["record"]
    on: bool


class Ping(Message):
    type: Literal["ping"]
    time: Milliseconds


class ControlLog(Message):
    """All that fixes a stream's frames, from its first one on.

    Attributes:
        model, settings: what made it, see `ModelInfo.settings_from`; the same is needed to make it again.
        shifts: [shift, signal] wherever the signal changed, null for none; a signal holds until the next entry.
        prompts: [shift, prompt] of every change after the first, at `shift` at the earliest.
        end: number of shifts.
        complete: False when there were more changes than a log can hold.
        first_frame, frames, height, width: what the video beside it shows.
    """

    version: Literal[1] = VERSION
    model: Name
    settings: Annotated[str, Field(max_length=1000)] = ""
    seed: Seed
    prompt: Prompt
    start: Name
    fps: Annotated[float, Field(gt=0, le=1000)]
    shifts: Annotated[list[tuple[Shift, Name | None]], Field(max_length=MAX_CHANGES)]
    prompts: Annotated[list[tuple[Shift, Prompt]], Field(max_length=MAX_PROMPT_CHANGES)]
    end: Annotated[int, Field(ge=1, le=MAX_SHIFTS)]
    complete: bool = True
    first_frame: Annotated[int, Field(ge=0)] = 0
    frames: Annotated[int, Field(ge=0)] = 0
    height: Annotated[int, Field(ge=0)] = 0
    width: Annotated[int, Field(ge=0)] = 0


class Replay(Message):
    """Makes the stream of a log again; after its end the stream goes on live."""

    type: Literal["replay"]
    log: ControlLog


Small = Signal | ChangePrompt | Reset | Pause | Wheel | Record | Ping
ClientMessage = Annotated[Small | Replay, Field(discriminator="type")]
_ADAPTER = TypeAdapter(ClientMessage)


def parse_message(text: str | bytes | None) -> Small | Replay:
    """One message of a client. A `ProtocolError` says in one line what is wrong with it.

    The parser itself refuses deep nesting and never recurses in Python, so no text can exhaust the stack.
    """
    if not isinstance(text, str):
        raise ProtocolError("binary messages are not understood; send JSON as text")
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_REPLAY_BYTES:
        raise ProtocolError(f"the message has {size} bytes; {MAX_REPLAY_BYTES} are the most")
    try:
        message = _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ProtocolError(_first_mistake(error)) from None
    except (ValueError, RecursionError, UnicodeError) as error:
        raise ProtocolError(f"the message is not JSON: {one_line(error)[:100]}") from None
    if size > MAX_MESSAGE_BYTES and not isinstance(message, Replay):
        raise ProtocolError(f"the message has {size} bytes; {MAX_MESSAGE_BYTES} are the most")
    return message


def _first_mistake(error: ValidationError) -> str:
    """The first of pydantic's complaints, without the client's own text in it."""
    mistake = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in mistake["loc"])
    return one_line(f"{place}: {mistake['msg']}" if place else mistake["msg"])[:200]


class FrameHeader(NamedTuple):
    """What stands before a frame's JPEG."""

    signal: int  # index into welcome.signals, −1 for none
    is_first: bool
    number: int
    signal_id: int
    stream: int


def pack_header(header: FrameHeader) -> bytes:
    flags = FIRST_OF_STREAM if header.is_first else 0
    wrapped = (value & 0xFFFFFFFF for value in (header.number, header.signal_id, header.stream))
    return HEADER.pack(VERSION, header.signal, flags, 0, *wrapped)


def unpack_frame(message: bytes) -> tuple[FrameHeader, bytes]:
    """(header, JPEG) of a binary message; a `ProtocolError` for another version."""
    if len(message) < HEADER.size or message[0] != VERSION:
        raise ProtocolError(f"a frame of protocol version {message[0] if message else None}; {VERSION} is understood")
    _, signal, flags, _, number, signal_id, stream = HEADER.unpack_from(message)
    return FrameHeader(signal, bool(flags & FIRST_OF_STREAM), number, signal_id, stream), message[HEADER.size :]


def to_json(message: dict) -> str:
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
