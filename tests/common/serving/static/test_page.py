"""The page in a real headless Chromium: what it shows of what a server says, and what it sends of what a user does.

The server is a double that can be made to load, fail and vanish; test_page_live.py has the real one.
"""

import json
import re
import time

import pytest
from playwright.sync_api import Page, expect

from data.miniworld import captions

pytestmark = pytest.mark.slow

SAME = """(before) => {
    const data = document.getElementById("screen").toDataURL();
    return before == null ? data : data === before;
}"""


def test_frames_move_on_a_crisp_screen(page: Page, fake_server):
    expect(page.locator("#status")).to_have_text("You drive")
    expect(page.locator("#card")).to_be_hidden()
    before = page.evaluate(SAME)
    assert len(before) > 2000, "one colour only"
    page.wait_for_function(f"before => !({SAME})(before)", arg=before)
    width, dots = page.evaluate("[document.getElementById('screen').getBoundingClientRect().width, devicePixelRatio]")
    assert width > 400 and (width * dots / fake_server.width) % 1 < 1e-6, "a whole number of screen pixels each"
    expect(page.locator("#stat-fps")).to_have_text("16.0 fps")
    expect(page.locator("#stat-memory")).to_have_text("640 MiB")
    page.wait_for_function("() => parseFloat(document.getElementById('stat-shown').textContent) > 10")


def test_keys_and_chords_become_signals(page: Page, fake_server):
    keys = page.keyboard
    for key in ("ArrowUp", "ArrowLeft"):
        keys.down(key)
        keys.down(key)  # a second keydown without a keyup is what repeat looks like
    expect(page.locator("#commanded")).to_have_text("DL")
    expect(page.locator("#held-words")).to_have_text("drive left")
    expect(page.locator("[data-direction=up]")).to_have_attribute("aria-pressed", "true")
    for key in ("ArrowUp", "ArrowLeft"):
        keys.up(key)
    for pressed in ("w", "wa", "wd", "s", "sa", "sd", "a", "d", "ws"):
        for key in pressed:
            keys.down(key)
        for key in pressed:
            keys.up(key)
    arrows, letters = ["N", "D", "DL", "NL", "N"], ["D", "N", "D", "DL", "NL", "N", "D", "DR", "NR", "N"]
    letters += ["B", "N", "B", "BL", "NL", "N", "B", "BR", "NR", "N", "NL", "N", "NR", "N"]
    # w and s together are neither: D, then N; letting w go leaves s, B; then N
    expected = [*arrows, *letters, "D", "N", "B", "N"]
    heard = fake_server.wait_for("signal", len(expected))
    assert [message["signal"] for message in heard] == expected
    ids = [message["id"] for message in heard]
    assert ids == sorted(set(ids)) and all(isinstance(message["time"], int | float) for message in heard)


def test_keys_are_released_when_the_window_loses_the_focus(page: Page, fake_server):
    page.keyboard.down("ArrowUp")
    assert fake_server.wait_for("signal", 2)[-1]["signal"] == "D"
    page.evaluate("dispatchEvent(new Event('blur'))")
    assert fake_server.wait_for("signal", 3)[-1]["signal"] == "N"
    page.keyboard.down("ArrowDown")
    assert fake_server.wait_for("signal", 4)[-1]["signal"] == "B"
    page.locator("#prompt").focus()
    assert fake_server.wait_for("signal", 5)[-1]["signal"] == "N"


def test_latency_is_measured_from_key_to_frame(page: Page, fake_server):
    pressed = time.perf_counter()
    page.keyboard.down("ArrowRight")
    expect(page.locator("#stat-latency")).to_have_text(re.compile(r"^\d+ ms \(median \d+\)$"))
    milliseconds = int(page.locator("#stat-latency").inner_text().split()[0])
    assert 0 <= milliseconds <= 1000 * (time.perf_counter() - pressed)


def test_the_selects_write_a_caption(page: Page, fake_server):
    words = page.evaluate(
        "import('/static/captions.js').then(({BIOMES, WEATHERS, COLORS}) => [BIOMES, WEATHERS, COLORS])"
    )
    biomes, weathers, colors = words
    assert biomes.keys() == captions.BIOME_WORDS.keys() and weathers.keys() == captions.WEATHER_WORDS.keys()
    assert all(phrase in captions.BIOME_WORDS[name] for name, phrase in biomes.items())
    assert all(phrase in captions.WEATHER_WORDS[name] for name, phrase in weathers.items())
    assert colors == list(captions.COLORS)

    # the selects follow the stream's prompt, whatever its wording
    expect(page.locator("#prompt")).to_have_value(fake_server.status["prompt"])
    assert [page.locator(f"#{part}").input_value() for part in ("biome", "weather", "color")] == [
        "desert",
        "sunset",
        "red",
    ]
    page.select_option("#biome", "snow")
    page.select_option("#color", "orange")
    opening = captions.OPENINGS[0].format(color="orange", biome=biomes["snow"], weather=weathers["sunset"])
    caption = f"{opening} {captions.VIEWS[0]}"
    expect(page.locator("#prompt")).to_have_value(caption)
    page.click("#apply")
    assert fake_server.wait_for("prompt") == [{"type": "prompt", "prompt": caption}]
    page.keyboard.down("ArrowUp")  # and not into the select that was changed last
    assert fake_server.wait_for("signal", 2)[-1]["signal"] == "D"


def test_free_text_and_reset(page: Page, fake_server):
    fake_server.wait_for("signal", 1)
    page.fill("#prompt", "")
    page.locator("#prompt").press_sequentially("wasd and p, r")
    page.keyboard.press("Enter")
    assert fake_server.wait_for("prompt") == [{"type": "prompt", "prompt": "wasd and p, r"}]
    assert len(fake_server.heard) == 2, "letters in a text box steer nothing"
    page.select_option("#examples", index=1)
    expect(page.locator("#color")).to_have_value("blue")
    page.select_option("#start", "00001")
    page.fill("#seed", "123")
    page.click("#reset")
    example = page.locator("#examples option").nth(1).get_attribute("value")
    expected = {"type": "reset", "prompt": example, "start": "00001", "seed": 123}
    assert fake_server.wait_for("reset") == [expected]
    for number in (2, 3):
        page.fill("#seed", "")
        page.click("#reset")
        fake_server.wait_for("reset", number)
    seeds = {message["seed"] for message in fake_server.messages("reset")}
    assert len(seeds) == 3, "no seed: another one each time"
    page.locator("#seed").focus()
    page.keyboard.press("Escape")
    page.keyboard.down("w")
    assert fake_server.wait_for("signal", 2)[-1]["signal"] == "D"


def test_pause_wheel_and_shortcuts(page: Page, fake_server):
    page.keyboard.press("p")
    assert fake_server.wait_for("pause") == [{"type": "pause", "paused": True}]
    fake_server.tell(state="paused")
    expect(page.locator("#card-title")).to_have_text("Paused")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    page.click("#card-button")
    assert fake_server.wait_for("pause", 2)[-1] == {"type": "pause", "paused": False}
    fake_server.tell(state="running")
    expect(page.locator("#card")).to_be_hidden()
    page.click("#wheel")
    assert fake_server.wait_for("wheel") == [{"type": "wheel", "take": False}]


def test_waiting_for_the_wheel(page: Page, fake_server):
    fake_server.tell(you_drive=False, driver=2, waiting=0)
    expect(page.locator("#badge")).to_have_text("Somebody else drives. You are watching.")
    for control in ("apply", "reset", "pause", "record"):
        expect(page.locator(f"#{control}")).to_be_disabled()
    count = len(fake_server.messages("signal"))
    page.keyboard.press("ArrowUp")
    page.click("#wheel")
    assert fake_server.wait_for("wheel") == [{"type": "wheel", "take": True}]
    assert len(fake_server.messages("signal")) == count, "who watches does not steer"
    fake_server.tell(waiting=2)
    expect(page.locator("#status")).to_have_text("Number 2 in line")
    fake_server.tell(driver=None, waiting=0)
    page.keyboard.down("ArrowUp")  # nobody drives: a key takes the wheel, and counts as soon as we have it
    assert fake_server.wait_for("wheel", 2)[-1] == {"type": "wheel", "take": True}
    fake_server.tell(you_drive=True, driver=1)
    assert fake_server.wait_for("signal", count + 1)[-1]["signal"] == "D"


def test_loading_errors_and_replaying(open_page, fake_server):
    fake_server.tell(state="loading", progress=0.25, message="reading the weights")
    page = open_page()
    expect(page.locator("#card-title")).to_have_text("Loading the model")
    expect(page.locator("#card-text")).to_have_text("reading the weights")
    assert page.locator("#card-progress").evaluate("bar => [bar.hidden, bar.value]") == [False, 0.25]
    fake_server.tell(state="running", progress=1.0, message="")
    expect(page.locator("#card")).to_be_hidden()
    fake_server.tell(state="loading", progress=0.5, message="starting a new world")
    expect(page.locator("#badge")).to_have_text("Starting a new drive")  # the old picture stays until then
    fake_server.tell(state="error", message="out of memory")
    expect(page.locator("#card-text")).to_have_text("out of memory")
    page.click("#card-button")
    assert fake_server.wait_for("reset") == [{"type": "reset"}]
    fake_server.tell(state="replaying", message="")
    expect(page.locator("#badge")).to_have_text("Replaying a control log")
    fake_server.send(type="error", message="the seed is no number")
    expect(page.get_by_role("alert")).to_contain_text("the seed is no number")


def test_lost_connection_shows_and_recovers(page: Page, fake_server):
    page.keyboard.down("ArrowUp")
    fake_server.wait_for("signal", 2)
    fake_server.close()
    expect(page.locator("#card-title")).to_have_text("Connection lost")
    expect(page.locator("#card-text")).to_have_text(re.compile(r"Trying again in \d s\."))
    expect(page.get_by_role("status")).to_have_text("Connection lost")
    fake_server.reopen()
    page.locator("#card-button").dispatch_event("click")  # hidden already if the page has tried again by itself
    expect(page.locator("#card")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text("You drive")
    assert fake_server.wait_for("signal", 3)[-1]["signal"] == "N", "a lost connection lets the keys go"
    page.keyboard.up("ArrowUp")
    before = page.evaluate(SAME)
    page.wait_for_function(f"before => !({SAME})(before)", arg=before)


def test_recording_and_replay(page: Page, fake_server, tmp_path):
    page.click("#record")
    assert fake_server.wait_for("record") == [{"type": "record", "on": True}]
    fake_server.tell(recording=True)
    expect(page.locator("#record")).to_have_text(re.compile(r"Stop 0:0\d"))
    page.keyboard.press("r")
    assert fake_server.wait_for("record", 2)[-1] == {"type": "record", "on": False}
    fake_server.tell(recording=False)
    log = {"seed": 7, "shifts": [[0, "D"]]}
    fake_server.downloads = {"/recordings/3.mp4": b"video", "/recordings/3.json": json.dumps(log).encode()}
    downloads = []
    page.on("download", lambda download: downloads.append(download))
    with page.expect_event("download", lambda download: download.suggested_filename == "3.json"):
        fake_server.send(type="recording", video="/recordings/3.mp4", log="/recordings/3.json", frames=40)
    assert [download.suggested_filename for download in downloads] == ["3.mp4", "3.json"]
    expect(page.locator("#recordings li")).to_contain_text("2.5 s")
    page.set_input_files("#replay", downloads[1].path())
    assert fake_server.wait_for("replay") == [{"type": "replay", "log": log}]
    broken = tmp_path / "log.json"
    broken.write_text("{")
    page.set_input_files("#replay", broken)
    expect(page.get_by_role("alert")).to_contain_text("log.json is not a control log")


def test_the_token_of_the_address_goes_along(open_page, fake_server):
    fake_server.refusal = (1008, "a token is needed, and this is not it")
    page = open_page(f"{fake_server.address}?token=a%26b")
    expect(page.locator("#card-title")).to_have_text("The server does not let you in")
    expect(page.locator("#card-text")).to_contain_text("token")
    assert "/ws?token=a%26b" in fake_server.requested
    fake_server.refusal = None
    expect(page.locator("#status")).to_have_text("You drive")  # it has tried again


def test_phone_with_two_thumbs(open_page, fake_server):
    page = open_page(viewport={"width": 390, "height": 844}, device_scale_factor=3, has_touch=True, is_mobile=True)
    expect(page.locator("#status")).to_have_text("You drive")
    fake_server.wait_for("signal", 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "nothing to scroll sideways"
    boxes = {name: page.locator(f"[data-direction={name}]").bounding_box() for name in ("up", "down", "left", "right")}
    for box in boxes.values():
        assert min(box["width"], box["height"]) >= 44 and box["y"] + box["height"] <= 844, "in reach of a thumb"
    middle = {k: {"x": b["x"] + b["width"] / 2, "y": b["y"] + b["height"] / 2} for k, b in boxes.items()}
    finger = page.context.new_cdp_session(page)

    def touch(kind: str, *directions: str) -> None:
        points = [{**middle[direction], "id": number} for number, direction in enumerate(directions)]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", "up")
    touch("touchStart", "up", "left")
    touch("touchMove", "up", "right")  # the left thumb slides over
    touch("touchMove", "down", "right")
    touch("touchEnd")
    heard = fake_server.wait_for("signal", 6)
    assert [message["signal"] for message in heard][:5] == ["N", "D", "DL", "DR", "BR"]
    # The thumbs may leave one after the other.
    assert heard[-1]["signal"] == "N" or fake_server.wait_for("signal", 7)[-1]["signal"] == "N"


def test_every_control_has_a_name_and_is_reached_by_keyboard(page: Page, fake_server):
    expect(page.locator("#status")).to_have_text("You drive")
    nameless = """[...document.querySelectorAll("button, input, select, textarea")].filter((element) =>
        element.checkVisibility() && !element.innerText?.trim() && !element.labels?.length && !element.ariaLabel)
        .map((element) => element.outerHTML)"""
    assert page.evaluate(nameless) == []
    reached = set()
    for _ in range(22):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.direction"))
    assert {
        "up",
        "left",
        "pause",
        "record",
        "wheel",
        "biome",
        "prompt",
        "apply",
        "start",
        "seed",
        "reset",
        "replay",
    } <= reached
    page.locator("[data-direction=up]").focus()
    page.keyboard.down("Space")
    assert fake_server.wait_for("signal", 2)[-1]["signal"] == "D"
    page.keyboard.up("Space")
    assert fake_server.wait_for("signal", 3)[-1]["signal"] == "N"
