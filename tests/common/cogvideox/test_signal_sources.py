"""Where control signals come from: schedules, the keyboard, and what is refused."""

import pytest
import torch

from common.cogvideox.control_adapter import ControlVocabulary
from common.cogvideox.signal_sources import LiveSignals, ScheduledSignals, clip_signals, make_signal_source
from common.config.errors import UserError

NAMES = ["D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR"]
VOCABULARY = ControlVocabulary(NAMES, torch.arange(9.0)[:, None] + 1, torch.tensor([-7.0]))


def test_names_are_one_a_raw_frame_and_the_last_holds():
    tokens = ["D"] * 8 + ["DL"] * 5 + ["B"] * 3
    source = make_signal_source(iter(tokens), VOCABULARY)
    assert source.window(0, 6) == [[0] * 4, [0] * 4, [0, 0, 0, 1], [1] * 4, [3] * 4, [3] * 4]  # frame 0: raw frame 0
    assert make_signal_source(["D", "N", "N", "N", "BR"], VOCABULARY).window(0, 3) == [[0] * 4, [6, 6, 6, 5], [5] * 4]
    assert make_signal_source("NL", VOCABULARY).window(3, 2) == [[7] * 4] * 2
    assert make_signal_source(None, None).window(0, 2) == [[-1] * 4] * 2


def test_a_schedule_is_read_only_as_far_as_the_window_reaches():
    taken = []
    source = ScheduledSignals((taken.append(j) or j % 9 for j in range(1000)), VOCABULARY)
    for shift in range(20):
        assert source.window(2 * shift, 9) == [[(2 * shift + i) % 9] * 4 for i in range(9)]
        assert len(taken) == 2 * shift + 9
    assert len(source._ahead) == 9
    names = (taken.append(n) or "D" for n in range(1000))
    taken.clear()
    ScheduledSignals(names, VOCABULARY).window(0, 9)
    assert len(taken) == 1 + 8 * 4


def test_the_condition_keeps_the_command_it_was_finished_under():
    commands = iter(["D", "DL", "N"])
    source = LiveSignals(lambda: next(commands), VOCABULARY)
    frames = [[frame for frame, *_ in source.window(f, 3)] for f in (0, 0, 2)]
    assert frames == [[0, 0, 0], [0, 1, 1], [1, 6, 6]]


@pytest.mark.parametrize(
    "control, word",
    [(["D"] * 4 + ["UP"], "'UP'"), ([9], "control index 9"), ([-2], "control index -2"), ([], "empty")],
)
def test_wrong_signals_are_named(control, word):
    with pytest.raises(UserError, match=word):
        make_signal_source(control, VOCABULARY).window(0, 3)


def test_control_for_a_model_without_it_and_too_few_signals_are_refused():
    with pytest.raises(UserError, match="stage 2"):
        make_signal_source(["D"], None)
    with pytest.raises(UserError, match="5 control signals for a clip that needs 9"):
        clip_signals(["D"] * 5, 3, VOCABULARY)
    with pytest.raises(UserError, match="2 control signals for a clip that needs 3"):
        clip_signals([0, 1], 3, VOCABULARY)
    assert clip_signals(["D"] * 8 + ["N"], 3, VOCABULARY) == [[0] * 4, [0] * 4, [0, 0, 0, 6]]
    assert clip_signals([0, 0, 6], 3, VOCABULARY) == [[0] * 4, [0] * 4, [6] * 4]
