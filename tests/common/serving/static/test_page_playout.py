"""The page's own queue: frames that come in bursts, late or too fast, shown at an even pace. Simulated time."""

import pytest
from playwright.sync_api import Page

pytestmark = pytest.mark.slow

# frames shown as [time, number] for frames that arrive as [time, number], on a screen of 60 Hz
PLAY = """async ([arrivals, fps, until]) => {
    const { Playout } = await import("/static/playout.js");
    const playout = new Playout(fps), shown = [];
    for (let now = 0, i = 0; now < until; now += 1000 / 60) {
        for (; i < arrivals.length && arrivals[i][0] <= now; i++) {
            playout.push({ number: arrivals[i][1], stream: 0, image: { close() {} } }, arrivals[i][0]);
        }
        const frame = playout.next(now);
        if (frame) shown.push([now, frame.number]);
    }
    return { shown, skipped: playout.skipped };
}"""


def bursts(interval: float, count: int, size: int = 8, start: float = 0.0) -> list[tuple[float, int]]:
    return [(start + interval * i, size * i + j) for i in range(count) for j in range(size)]


def play(page: Page, arrivals: list[tuple[float, int]], until: float, fps: int = 16) -> tuple[list, int]:
    result = page.evaluate(PLAY, [arrivals, fps, until])
    return result["shown"], result["skipped"]


def test_bursts_are_played_evenly(page: Page):
    shown, skipped = play(page, bursts(500, 20), until=10_000)
    assert skipped == 0 and [number for _, number in shown] == list(range(len(shown))) and len(shown) >= 158
    gaps = [after - before for (before, _), (after, _) in zip(shown, shown[1:], strict=False)]
    assert max(gaps) < 90 and min(gaps) > 40  # 62.5 ms, give or take a beat of the screen
    arrived = {number: time for time, number in bursts(500, 20)}
    assert all(time - arrived[number] < 560 for time, number in shown), "a burst waits for its own length only"


def test_a_slow_generator_is_played_at_its_own_rate(page: Page):
    """Eight frames every 0.8 s, that is 10 a second instead of 16: no stutter of half a second on, half off."""
    shown, skipped = play(page, bursts(800, 20), until=16_000)
    gaps = [after - before for (before, _), (after, _) in zip(shown, shown[1:], strict=False) if before > 3000]
    assert skipped == 0 and max(gaps) < 150 and min(gaps) > 60


def test_a_stall_is_made_up_for(page: Page):
    """Two seconds of nothing, then all at once: at most two bursts of delay, and none a while later."""
    arrivals = [(max(time, 4000.0) if time > 2000 else time, number) for time, number in bursts(500, 30)]
    arrived = {number: 500.0 * (number // 8) for _, number in arrivals}
    shown, skipped = play(page, arrivals, until=15_000)
    assert skipped > 0
    assert all(time - arrived[number] < 1700 for time, number in shown if time > 4100)
    assert all(time - arrived[number] < 800 for time, number in shown if time > 12_000)
