"""Where a stream's control signals come from: a schedule known ahead, or whoever holds the keyboard.

A source answers one question, once a window shift and right before the first forward that needs the answer: which
signals do the raw frames of each latent frame in the window have? Answers are indices into the model's vocabulary; −1
is null. Latent frame 0 is of one raw frame, whose signal is given R times; frame j ≥ 1 is of the raw frames R·(j−1)+1 …
R·j, as in training.

Shapes: F latent frames of a window, R raw frames of a latent frame.
"""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from common.cogvideox.control_adapter import NULL_INDEX, ControlVocabulary
from common.config.errors import UserError

Signal = str | int
Control = Iterable[Signal] | Callable[[], Signal] | None
_END = object()  # of a schedule


def signal_index(signal: Signal, vocabulary: ControlVocabulary) -> int:
    """Name or index → index, −1 allowed; a `UserError` names what the model knows."""
    if isinstance(signal, str):
        return int(vocabulary.indices([signal])[0])
    index = operator.index(signal)
    if not NULL_INDEX <= index < len(vocabulary.names):
        raise UserError(f"control index {index} is not one of -1 (null) … {len(vocabulary.names) - 1}")
    return index


class SignalSource(Protocol):
    def window(self, first_frame: int, num_frames: int) -> list[list[int]]:
        """Indices [F][R] of latent frames first_frame … first_frame+num_frames−1; `first_frame` never falls."""
        ...


class ConstantSignal:
    """Every frame has the same signal."""

    def __init__(self, index: int = NULL_INDEX, stride: int = 4):
        self._frame = [index] * stride

    def window(self, first_frame: int, num_frames: int) -> list[list[int]]:
        return [self._frame] * num_frames


class ScheduledSignals:
    """A schedule, read as far ahead as the window reaches and no further; what lies behind is forgotten.

    Args:
        signals: names are one a raw frame; integers are one a latent frame. After its end the last one holds.
        stride: R, raw frames per latent frame.
    """

    def __init__(self, signals: Iterable[Signal], vocabulary: ControlVocabulary, stride: int = 4):
        self._signals, self._vocabulary, self._stride = iter(signals), vocabulary, stride
        self._start = 0
        self._ahead: deque[list[int]] = deque()
        self._last: int | None = None

    def _read(self) -> list[int]:
        """The next latent frame's signals [R]."""
        is_first, frame = self._last is None, []
        while len(frame) < self._stride:
            signal = next(self._signals, _END)
            if signal is not _END:
                self._last = signal_index(signal, self._vocabulary)
            if self._last is None:
                raise UserError("the control schedule is empty; it needs at least one signal")
            speaks_for_one = isinstance(signal, str) and not is_first
            frame += [self._last] * (1 if speaks_for_one else self._stride - len(frame))
        return frame

    def window(self, first_frame: int, num_frames: int) -> list[list[int]]:
        while len(self._ahead) < first_frame - self._start + num_frames:
            self._ahead.append(self._read())
        while self._start < first_frame:
            self._ahead.popleft()
            self._start += 1
        return [self._ahead[i] for i in range(num_frames)]


class LiveSignals:
    """A callable that is asked once a window; the newest command goes to every frame still in noise.

    The condition frame keeps the command under which it was finished. (Giving the newest command only to the group that
    enters, as published, delays it by the whole window: 28 frames instead of 5.)
    """

    def __init__(self, ask: Callable[[], Signal], vocabulary: ControlVocabulary, stride: int = 4):
        self._ask, self._vocabulary, self._stride = ask, vocabulary, stride
        self._finished: list[int] | None = None

    def window(self, first_frame: int, num_frames: int) -> list[list[int]]:
        newest = [signal_index(self._ask(), self._vocabulary)] * self._stride
        condition = newest if self._finished is None else self._finished
        self._finished = newest
        return [condition] + [newest] * (num_frames - 1)


def make_signal_source(control: Control, vocabulary: ControlVocabulary | None, stride: int = 4) -> SignalSource:
    """The source for what a caller passed as `control`; None is the null signal throughout."""
    if control is None:
        return ConstantSignal(stride=stride)
    if vocabulary is None:
        raise UserError("control was given, but this model has no control adapter (stage 2 adds it)")
    if isinstance(control, str):
        return ConstantSignal(signal_index(control, vocabulary), stride)
    source = LiveSignals if callable(control) else ScheduledSignals
    return source(control, vocabulary, stride)


def clip_signals(
    control: Sequence[Signal] | str | None, num_frames: int, vocabulary: ControlVocabulary | None, stride: int = 4
) -> list[list[int]]:
    """Indices [F][R] of a whole clip of `num_frames` latent frames; a sequence that is too short is a `UserError`."""
    if control is not None and not isinstance(control, str):
        control = list(control)
        needed = (num_frames - 1) * stride + 1 if control and isinstance(control[0], str) else num_frames
        if len(control) < needed:
            raise UserError(f"{len(control)} control signals for a clip that needs {needed}")
    return make_signal_source(control, vocabulary, stride).window(0, num_frames)
