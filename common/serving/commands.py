"""What each message of a client does. A `ProtocolError` means that the client should have known better."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from common.serving import protocol
from common.serving.client_session import ClientSession
from common.serving.model import FROM_TEXT
from common.serving.protocol import ProtocolError

if TYPE_CHECKING:
    from common.serving.room import Room

# Settings that are digests: two of them side by side tell nobody anything.
DIGESTS = ("weights", "vae", "text_encoder", "tokenizer", "scheduler", "control_vocabulary", "light_decoder", "clip")


def obey(room: Room, client: ClientSession, message: protocol.Message) -> None:
    """Does what a client asks for, if it may."""
    now = time.monotonic()
    if isinstance(message, protocol.Ping):
        client.say({"type": "pong", "time": message.time})
    elif isinstance(message, protocol.Wheel):
        driver = room.wheel.driver
        (room.wheel.take if message.take else room.wheel.release)(client.id, now)
        room.after_wheel(driver)
        room.tell_status()
    elif room.wheel.driver != client.id:
        client.error(f"only the driver can do that ({message.type}); ask for the wheel")
    elif isinstance(message, protocol.Signal):
        hold_signal(room, client, message, now)
    else:
        room.wheel.active(now)
        drive(room, client, message)


def hold_signal(room: Room, client: ClientSession, message: protocol.Signal, now: float) -> None:
    if message.signal not in room.info.signals:
        raise ProtocolError(f"signal: unknown; known are {', '.join(room.info.signals) or 'none'}")
    if message.id <= client.last_signal_id:
        raise ProtocolError(f"signal: id {message.id} comes after {client.last_signal_id}; ids have to rise")
    if message.signal != client.last_signal:  # the same again is no sign of life: a stone may lie on the key
        room.wheel.active(now)
    client.last_signal_id, client.last_signal = message.id, message.signal
    room.engine.signal(message.signal, message.id, client.id)


def drive(room: Room, client: ClientSession, message: protocol.Message) -> None:
    """The rest of what only the driver can do."""
    engine = room.engine
    if isinstance(message, protocol.ChangePrompt):
        if engine.is_replaying:
            client.error("the replay says which prompts it has; wait for its end, or reset")
        else:
            engine.change_prompt(message.prompt)
    elif isinstance(message, protocol.Reset):
        if message.start not in (None, FROM_TEXT, *room.info.clips):
            raise ProtocolError("reset.start: unknown; see welcome.clips")
        engine.restart(message.prompt, message.seed, message.start)
    elif isinstance(message, protocol.Pause):
        engine.pause(message.paused)
    elif isinstance(message, protocol.Replay):
        replay(room, client, message.log)
    elif isinstance(message, protocol.Record):
        if message.on:
            room.record(client)
        else:
            room.end_recording()
        room.tell_status()


def differences(here: str, logged: str) -> str:
    """What settings of the model differ, in words: "dtype is float32 (in the log: bfloat16), …"; "" when none does."""
    ours, theirs = (dict(part.split("=", 1) for part in told.split() if "=" in part) for told in (here, logged))
    parts = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        mine, other = (settings.get(name, "not given") for settings in (ours, theirs))
        if mine == other:
            continue
        if name in DIGESTS and name in ours and name in theirs:
            parts.append("the model's weights are others" if name == "weights" else f"the {name} is another")
        else:
            parts.append(f"{name} is {mine} (in the log: {other})")
    return ", ".join(parts)


def replay(room: Room, client: ClientSession, log: protocol.ControlLog) -> None:
    info = room.info
    if log.model != info.name:
        client.error(f"the log was made with the model {log.model}, here runs {info.name}; it cannot be replayed")
    elif log.start != FROM_TEXT and log.start not in info.clips:
        client.error("the log starts from a clip that this server does not have")
    elif differ := differences(info.settings_from(log.start), log.settings):
        client.error(f"the log cannot be replayed: {differ}")
    elif not log.complete:
        client.error("the log is not complete: its drive had more changes than a log can hold")
    elif any(signal is not None and signal not in info.signals for _, signal in log.shifts):
        raise ProtocolError("replay.log.shifts: a signal that the model does not have")
    else:
        room.engine.restart(log.prompt, log.seed, log.start, log)
