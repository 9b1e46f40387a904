"""Decoding a chunk while the next shift is made: what is done in which order, and that nothing is lost by it."""

from types import SimpleNamespace

import pytest
import torch

from common.cogvideox.pipeline_cogvideox import CogVideoXStreamingPipeline


class Recorder:
    """Stands in for a decoder: a chunk's frames are its latents, and what was asked for when is written down."""

    def __init__(self, log):
        self.log = log

    def submit(self, latents):
        self.log.append("decode")
        return SimpleNamespace(result=lambda: self.log.append("wait") or latents)


def taken(model, overlap, control, chunks):
    """(log, chunks taken, the error that ended the stream or None)"""
    log, made = [], []
    pipeline = CogVideoXStreamingPipeline.from_pretrained(model)
    stream = pipeline.stream("a car", control, num_chunks=chunks, seed=0, overlap=overlap)
    advance = stream.advance
    stream.decoder = Recorder(log)
    stream.advance = lambda: log.append("shift") or advance()
    try:
        made.extend(stream)
    except RuntimeError as error:
        return log, made, error
    return log, made, None


def test_overlapped_chunks_are_the_same_and_none_is_made_in_vain(tiny_models):
    log, made, _ = taken(tiny_models / "stage4", True, [0] * 9, chunks=3)
    plain_log, plain, _ = taken(tiny_models / "stage4", False, [0] * 9, chunks=3)
    assert plain_log == ["shift", "decode", "wait"] * 3
    assert log == ["shift", "decode", "shift", "wait", "decode", "shift", "wait", "decode", "wait"]
    assert len(made) == len(plain) == 3 and all(map(torch.equal, made, plain))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_in_one_shift_loses_no_frames_of_the_one_before(tiny_models, overlap):
    calls = []

    def command():
        calls.append(0)
        if len(calls) == 4:  # once more at the start than there are shifts
            raise RuntimeError("the joystick is gone")
        return "D"

    _, made, error = taken(tiny_models / "stage4", overlap, command, chunks=None)
    assert len(made) == 2 and "joystick" in str(error)
