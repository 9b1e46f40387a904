"""Messages and frames on the wire, without a network."""

import json

import pytest

from common.serving.protocol import (
    MAX_CHANGES,
    MAX_MESSAGE_BYTES,
    MAX_REPLAY_BYTES,
    FrameHeader,
    ProtocolError,
    pack_header,
    parse_message,
    unpack_frame,
)

LOG = {
    "version": 1, "model": "m", "settings": "s", "seed": 3, "prompt": "p", "start": "text", "fps": 16,
    "shifts": [[0, "N"], [4, None]], "prompts": [[2, "q"]], "end": 9,
}  # fmt: skip


def test_frames_are_packed_as_the_page_reads_them():
    packed = pack_header(FrameHeader(-1, True, 0x01020304, 5, 2**32 + 6)) + b"\xff\xd8jpeg"
    assert packed[:16].hex() == "01ff0100" + "04030201" + "05000000" + "06000000"
    assert unpack_frame(packed) == (FrameHeader(-1, True, 0x01020304, 5, 6), b"\xff\xd8jpeg")
    for wrong in (b"", b"\x01short", b"\x02" + packed[1:]):
        with pytest.raises(ProtocolError, match="version"):
            unpack_frame(wrong)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "signal", "signal": "DL", "id": 3, "time": 17.5},
        {"type": "signal", "signal": "DL", "id": 2**32 - 1, "time": 1},
        {"type": "prompt", "prompt": "ü" * 1000},
        {"type": "reset"},
        {"type": "reset", "prompt": "x", "seed": 2**53 - 1, "start": "text"},
        {"type": "pause", "paused": True},
        {"type": "wheel", "take": False},
        {"type": "record", "on": True},
        {"type": "ping", "time": 0},
        {"type": "replay", "log": LOG},
    ],
    ids=lambda message: message["type"],
)
def test_good_messages_are_understood(message):
    parsed = parse_message(json.dumps(message, ensure_ascii=False))
    assert parsed.type == message["type"]
    for name, value in message.items():
        if name != "log":
            assert getattr(parsed, name) == value


def broken_log(**changes):
    return json.dumps({"type": "replay", "log": LOG | changes})


BAD = {
    "nothing": "",
    "no JSON": "drive left!",
    "binary": b"\x00\x01",
    "none": None,
    "a list": "[]",
    "a number": "7",
    "no type": "{}",
    "unknown type": '{"type":"eval"}',
    "type of a wrong type": '{"type":["ping"]}',
    "a field too many": '{"type":"ping","time":1,"__class__":"x"}',
    "a field too few": '{"type":"signal","signal":"D"}',
    "text for a number": '{"type":"ping","time":"1"}',
    "a truth for a number": '{"type":"signal","signal":"D","id":true}',
    "a fraction for a whole number": '{"type":"signal","signal":"D","id":1.5}',
    "a number for a truth": '{"type":"pause","paused":1}',
    "not a number": '{"type":"ping","time":NaN}',
    "infinity": '{"type":"ping","time":1e999}',
    "negative": '{"type":"signal","signal":"D","id":-1}',
    "past 32 bits": '{"type":"signal","signal":"D","id":4294967296}',
    "thousands of digits": '{"type":"signal","signal":"D","id":%s}' % ("9" * 4000),
    "an empty prompt": '{"type":"prompt","prompt":""}',
    "a long prompt": json.dumps({"type": "prompt", "prompt": "x" * 1001}),
    "a long name": json.dumps({"type": "reset", "start": "x" * 101}),
    "a huge seed": '{"type":"reset","seed":9007199254740992}',
    "half a character": '"\\ud800"',
    "half a character, raw": '{"type":"prompt","prompt":"\ud800"}',
    "nested lists": "[" * 4000,
    "nested objects": '{"a":' * 800,
    "nested inside": '{"type":"reset","start":' + "[" * 2000 + "]" * 2000 + "}",
    "large for a small message": json.dumps({"type": "prompt", "prompt": "x"}) + " " * MAX_MESSAGE_BYTES,
    "large in bytes": json.dumps({"type": "prompt", "prompt": "€" * 1400}, ensure_ascii=False),
    "too large for any": broken_log() + " " * MAX_REPLAY_BYTES,
    "a log of another version": broken_log(version=2),
    "a log without end": broken_log(end=0),
    "an endless log": broken_log(end=10**9),
    "a log with too many changes": broken_log(shifts=[[0, "D"]] * (MAX_CHANGES + 1)),
    "a log with a long prompt": broken_log(prompts=[[0, "x" * 1001]]),
    "a log with too many prompts": broken_log(prompts=[[0, "x"]] * 65),
    "a log with a wrong pair": broken_log(shifts=[[0, "D", 1]]),
    "a log with a negative shift": broken_log(shifts=[[-1, "D"]]),
    "a log of no speed": broken_log(fps=0),
    "a log that is a path": json.dumps({"type": "replay", "log": "/etc/passwd"}),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_bad_messages_are_refused_in_one_line_without_their_own_words(text):
    with pytest.raises(ProtocolError) as error:
        parse_message(text)
    line = str(error.value)
    assert 0 < len(line) <= 200 and "\n" not in line
    assert "xxx" not in line and "999999" not in line and "passwd" not in line
