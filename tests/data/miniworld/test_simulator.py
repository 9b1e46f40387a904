"""The physics against what the signals mean, and the labels against the index's vocabulary."""

from dataclasses import fields

import numpy as np
import pytest

from common.data.control_signals import CONTROL_TOKENS
from data.miniworld.simulator import SIGNALS, State, random_signals, random_start, simulate

AT_REST = State(x=0.0, y=0.0, heading=0.0)


def drive(text, start=AT_REST):
    """Each letter group held for two seconds."""
    return simulate([signal for signal in text.split() for _ in range(32)], start=start)


def test_signals_are_the_control_vocabulary_in_its_order():
    assert SIGNALS == CONTROL_TOKENS == ("D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR")


def test_drive_speeds_up_neutral_slows_down_brake_stops_and_reverses():
    car = drive("D N D B")
    driving, coasting, braking = car[:32], car[32:64], car[96:]
    assert (np.diff(driving.speed) > 0).all() and driving.speed[-1] > 10
    assert (np.diff(coasting.speed) < 0).all() and 0 < coasting.speed[-1] < 1
    assert (np.diff(braking.speed) < 0).all() and braking.speed[-1] < -4
    # Brake lights until it stands, reverse lights once it rolls back, neither while coasting.
    assert braking.braking[0] and not braking.reversing[0]
    assert braking.reversing[-1] and not braking.braking[-1]
    assert not coasting.braking.any() and not coasting.reversing.any()


def test_answer_takes_a_few_frames():
    speed = drive("D").speed
    assert speed[0] < 0.3 * speed[-1] < speed[3] and speed[9] > 0.8 * speed[-1]
    yaw_rate = drive("NL").yaw_rate
    assert yaw_rate[0] < 0.5 * yaw_rate[-1] < yaw_rate[3]


@pytest.mark.parametrize("pedal", ["D", "B", "N"])
def test_left_is_left_and_right_its_mirror_image(pedal):
    left, right, straight = (drive(pedal + wheel) for wheel in ("L", "R", ""))
    assert left.yaw_rate[-1] > 0.3 and (np.diff(left.heading) > 0).all()
    np.testing.assert_allclose(right.yaw_rate, -left.yaw_rate)
    np.testing.assert_allclose(right.x, -left.x, atol=1e-12)
    np.testing.assert_allclose(right.y, left.y, atol=1e-12)
    assert (straight.yaw_rate == 0).all()


def test_a_left_turn_while_driving_bends_to_the_west():
    """Heading 0 looks along +y; left of that is −x."""
    car = drive("DL")
    assert car.x[-1] < -1 and car.y[-1] > 1


def test_position_is_the_integral_of_speed():
    car = drive("D DL B NR")
    steps = np.hypot(np.diff(car.x), np.diff(car.y))
    np.testing.assert_allclose(steps, np.abs(car.speed[1:]) / 16, rtol=1e-9)
    np.testing.assert_allclose(np.diff(car.heading), car.yaw_rate[1:] / 16, rtol=1e-9, atol=1e-12)


def test_going_on_from_the_final_state_equals_one_drive():
    signals = random_signals(60, np.random.default_rng(3))
    whole = simulate(signals, seed=7)
    first = simulate(signals[:25], seed=7)
    final = State(*(float(getattr(first, field.name)[-1]) for field in fields(State)))
    rest = simulate(signals[25:], start=final)
    np.testing.assert_array_equal(np.concatenate([first.speed, rest.speed]), whole.speed)
    np.testing.assert_array_equal(np.concatenate([first.x, rest.x]), whole.x)


def test_unknown_signal_is_named():
    with pytest.raises(ValueError, match="'X'.*D, DL"):
        simulate(["D", "X"])


def test_all_nine_signals_occur_and_change_at_random_times():
    signals = random_signals(20000, np.random.default_rng(0))
    names, counts = np.unique(signals, return_counts=True)
    assert set(names) == set(SIGNALS) and counts.min() > 0.04 * len(signals)
    changes = np.flatnonzero(np.array(signals[1:]) != np.array(signals[:-1]))
    lengths = np.diff(changes)
    assert lengths.min() >= 9 and lengths.max() <= 36 and len(np.unique(lengths)) > 15


def test_starts_are_spread_over_speed_heading_and_place():
    starts = [random_start(np.random.default_rng(seed)) for seed in range(300)]
    speed = np.array([start.speed for start in starts])
    assert speed.min() < -3 and speed.max() > 10 and 2 < speed.std() < 8
    sine = np.sin([start.heading for start in starts])
    assert (np.abs(sine) < 0.5).mean() > 0.3 and ((np.abs(sine) > 0.5) & (np.abs(sine) < 0.8)).mean() > 0.03
