"""Decoding a chunk while the next shift is made: what is done in which order, and that nothing is lost by it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.cogvideox.chunk_decoder import to_uint8
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
    shift = stream.shift
    stream.decoder = Recorder(log)
    stream.shift = lambda: log.append("shift") or shift()
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


def test_who_takes_latents_in_between_gets_them_in_order(tiny_models):
    pipeline = CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage4")

    def stream(overlap):
        return pipeline.stream("a car", "D", num_chunks=4, seed=0, overlap=overlap)

    mixed, plain = stream(True), list(stream(False))
    found = [next(mixed), mixed.decode(mixed.advance()), next(mixed)]
    for one, other in zip(found, plain, strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_overlapped_frames_are_the_same_and_keep_being_so_after_the_device_went_on(tiny_models, device):
    """On a GPU decoding has a queue and memory of its own: nothing may be read too early or overwritten too soon."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pipeline = CogVideoXStreamingPipeline.from_pretrained(tiny_models / "stage4").to(device)

    def frames(overlap):
        return list(pipeline.stream("a car", "D", num_chunks=6, seed=0, overlap=overlap))

    plain, overlapped = frames(False), frames(True)
    assert [chunk.shape[0] for chunk in overlapped] == [9, 8, 8, 8, 8, 8]
    for one, other in zip(plain, overlapped, strict=True):
        np.testing.assert_array_equal(one, other)
    latents = [torch.randn(1, n, 16, 4, 6, generator=torch.Generator().manual_seed(n)).to(device) for n in (3, 2)]
    together, alone = pipeline.make_decoder(), pipeline.make_decoder()
    pending = [together.submit(chunk) for chunk in latents]  # both before either is waited for
    for chunk, waiting in zip(latents, pending, strict=True):
        levels = to_uint8(alone.decode(chunk))[0].cpu().numpy()
        assert np.abs(waiting.result().astype(int) - levels).max() <= 1
