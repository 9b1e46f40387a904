"""Who drives when: the rules of the wheel, of the even pace, and of a stream's history. No network."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from common.serving.history import History
from common.serving.model import ModelInfo, Start
from common.serving.playout import Frame, Playout
from common.serving.protocol import MAX_CHANGES, ControlLog
from common.serving.wheel import Wheel

INFO = ModelInfo("m", ["D", "DL", "N"], 32, 48, 16.0, 4, "settings")


# The wheel


def test_the_first_drives_and_who_waits_comes_before_who_watches():
    wheel = Wheel(idle_seconds=30)
    for client in (1, 2, 3, 4):
        wheel.join(client, now=0)
    assert wheel.driver == 1 and wheel.waiting == []
    wheel.take(4, 1)
    wheel.take(3, 2)
    wheel.take(3, 2)
    wheel.take(1, 2)  # drives already
    assert wheel.waiting == [4, 3]
    wheel.leave(1, 3)
    assert wheel.driver == 4 and wheel.waiting == [3]
    wheel.release(4, 4)
    assert wheel.driver == 3
    wheel.leave(3, 5)
    assert wheel.driver == 2  # only watched, but never said no
    wheel.leave(2, 6)
    assert wheel.driver is None  # 4 gave it back
    wheel.take(4, 7)
    assert wheel.driver == 4
    wheel.leave(4, 8)
    wheel.leave(4, 8)
    wheel.join(5, 9)
    assert wheel.driver == 5


def test_an_idle_driver_loses_the_wheel_to_who_waits_and_to_nobody_else():
    wheel = Wheel(idle_seconds=30)
    wheel.join(1, 0)
    wheel.join(2, 0)
    wheel.expire(1000)
    assert wheel.driver == 1
    wheel.active(1000)
    wheel.take(2, 1001)
    wheel.expire(1029.9)
    assert wheel.driver == 1
    wheel.expire(1030)
    assert wheel.driver == 2 and wheel.waiting == []
    wheel.take(1, 1040)
    wheel.expire(1059)
    assert wheel.driver == 2  # its own time began when it got the wheel
    wheel.expire(1060)
    assert wheel.driver == 1


# The pace


def make_frames(count, first=0):
    pixels = np.zeros((2, 2, 3), np.uint8)
    return [Frame(pixels, 0, first + i, 0, -1, 0, None, None) for i in range(count)]


def gaps_of(playout, now=0.0):
    """Seconds between the frames that wait, each leaving the moment it may; simulated time that begins at `now`."""
    times = []
    while len(playout):
        now = max(now, playout._due)
        times.append(now)
        with playout.condition:
            playout._leave(now)
    return np.diff(times)


def test_a_fast_world_is_paced_and_a_slow_one_is_shown_evenly():
    playout = Playout(50.0, threading.Condition())
    playout.put(make_frames(12), 0.001)
    assert gaps_of(playout) == pytest.approx(0.02)
    playout.clear()
    playout.put(make_frames(5), 0.05)  # 20 a second is all it can
    assert gaps_of(playout) == pytest.approx(0.97 * 0.05)


def test_lost_time_is_made_up_for_gently_and_a_pause_is_not():
    playout = Playout(50.0, threading.Condition())
    playout.put(make_frames(10), 0.001)
    gaps_of(playout)
    playout.put(make_frames(40), 0.001)  # due at 0.2
    gaps = gaps_of(playout, now=0.23)
    assert gaps[:10] == pytest.approx(0.018) and gaps[-10:] == pytest.approx(0.02)
    playout.put(make_frames(400), 0.001)  # so late that the rest is forgotten
    assert np.sum(gaps_of(playout, now=60.0) < 0.019) == pytest.approx(0.5 / 0.002, abs=2)
    playout.pause(True)
    playout.pause(False)
    playout.put(make_frames(10), 0.001)
    assert gaps_of(playout, now=90.0) == pytest.approx(0.02)


def test_frames_leave_on_time_and_none_while_paused():
    playout, times = Playout(20.0, threading.Condition()), []

    def take():
        while playout.take() is not None:
            times.append(time.perf_counter())

    thread = threading.Thread(target=take)
    thread.start()
    playout.pause(True)
    playout.put(make_frames(6), 0.001)
    time.sleep(0.1)
    assert len(playout) == 6 and not times
    began = time.perf_counter()
    playout.pause(False)
    while len(playout):
        time.sleep(0.01)
    playout.close()
    thread.join(60)
    assert len(times) == 6 and times[-1] - began >= 5 * 0.9 / 20


def test_how_long_the_frames_last_and_the_end():
    playout = Playout(10.0, threading.Condition())
    assert playout.seconds_left() == 0
    playout.put(make_frames(5), 0.001)
    began = time.perf_counter()
    playout.take()
    left, passed = playout.seconds_left(), time.perf_counter() - began
    assert 0.5 - passed <= left <= 0.5
    playout.clear()
    threading.Timer(0.05, playout.close).start()
    assert playout.take() is None  # and does not wait for ever


# The history


def test_a_history_keeps_changes_only_and_a_replay_gives_them_back():
    history = History(INFO, Start("p", 3))
    for signal in ["N", "N", "D", "D", None, "DL", "DL"]:
        history.note_signal(signal)
        if history.shift == 4:
            history.note_prompt("q")
        history.shift += 1
    log = history.log(end=6, first_frame=2, frames=11)
    assert log.shifts == [(0, "N"), (2, "D"), (4, None), (5, "DL")] and log.prompts == [(4, "q")] and log.complete
    assert history.log(end=4, first_frame=0, frames=1).shifts == [(0, "N"), (2, "D")]
    assert (log.model, log.seed, log.prompt, log.start, log.fps, log.end) == ("m", 3, "p", "text", 16.0, 6)
    again = History(INFO, Start("p", 3, log=ControlLog.model_validate_json(log.model_dump_json())))
    replayed = []
    while again.is_replaying:
        replayed.append((again.replayed_signal(), again.replayed_prompt()))
        again.shift += 1
    assert replayed == [("N", None), ("N", None), ("D", None), ("D", None), (None, "q"), ("DL", None)]
    assert again.replayed_prompt() is None


def test_a_history_does_not_grow_without_end():
    history = History(INFO, Start("p", 3))
    for shift in range(MAX_CHANGES + 100):
        history.shift = shift
        history.note_signal("D" if shift % 2 else "N")
    log = history.log(10**6, 0, 0)
    assert len(log.shifts) == MAX_CHANGES and not log.complete


def test_a_log_without_signals_and_one_out_of_order():
    log = SimpleNamespace(end=4, shifts=[], prompts=[])
    assert History(INFO, Start("p", 3, log=log)).replayed_signal() is None
    log = SimpleNamespace(end=4, shifts=[(2, "D"), (1, "N")], prompts=[])
    history, signals = History(INFO, Start("p", 3, log=log)), []
    while history.is_replaying:
        signals.append(history.replayed_signal())
        history.shift += 1
    assert signals == [None, "N", "D", "D"]
