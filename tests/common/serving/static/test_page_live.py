"""The page in front of the real server with an untrained model: frames, signals, prompts, a recording, its replay."""

import json
import threading
import time
from collections.abc import Iterator

import decord
import pytest
from playwright.sync_api import Page, expect

from common.data.control_signals import CONTROL_TOKENS
from common.serving.model import ModelOptions, inspect_model
from common.serving.server import listen, make_app, make_server, parse_arguments

pytestmark = pytest.mark.slow

# Keeps all that the badge and the executed signal say from now on.
WATCH = """() => {
    window.seen = new Set();
    for (const id of ["badge", "commanded"]) {
        const element = document.getElementById(id);
        const options = { childList: true, characterData: true, subtree: true };
        new MutationObserver(() => seen.add(element.textContent)).observe(element, options);
    }
}"""


@pytest.fixture(scope="module")
def address(tiny_models) -> Iterator[str]:
    """Of a server in a thread of its own."""
    args = parse_arguments(["--model_path", str(tiny_models / "stage4"), "--port", "0", "--threads", "1"])
    options = ModelOptions(model_path=args.model_path)
    listener = listen("127.0.0.1", 0)
    server = make_server(make_app(options, inspect_model(options), args))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.fixture
def live(open_page, address) -> Page:
    page = open_page(address, viewport={"width": 1280, "height": 800})
    expect(page.locator("#status")).to_have_text("You drive", timeout=60_000)
    return page


def test_drives_with_keys_and_another_prompt(live: Page):
    screen = "document.getElementById('screen').toDataURL()"
    before = live.evaluate(screen)
    live.wait_for_function(f"before => {screen} !== before", arg=before)
    expect(live.locator("#commanded")).to_have_text("N")
    live.keyboard.down("ArrowUp")
    live.keyboard.down("ArrowRight")
    expect(live.locator("#commanded")).to_have_text("DR")
    expect(live.locator("#stat-latency")).not_to_have_text("–")
    live.evaluate("dispatchEvent(new Event('blur'))")
    expect(live.locator("#commanded")).to_have_text("N")
    live.select_option("#weather", "fog")
    live.click("#apply")
    live.click("#pause")
    expect(live.locator("#card-title")).to_have_text("Paused")
    live.click("#pause")
    expect(live.locator("#card")).to_be_hidden()
    expect(live.locator("#toasts")).to_be_empty()


def test_a_second_page_waits_for_the_wheel(live: Page, open_page, address):
    second = open_page(address)
    expect(second.locator("#badge")).to_have_text("Somebody else drives. You are watching.")
    second.click("#wheel")
    expect(second.locator("#status")).to_have_text("Number 1 in line")
    live.click("#wheel")
    expect(second.locator("#status")).to_have_text("You drive")
    expect(live.locator("#badge")).to_have_text("Somebody else drives. You are watching.")


def test_a_recording_is_downloaded_and_replayed(live: Page, tmp_path):
    live.fill("#seed", "11")
    live.click("#reset")
    expect(live.locator("#seed-now")).to_have_text("· now 11")
    expect(live.locator("#status")).to_have_text("You drive")
    live.keyboard.press("r")
    expect(live.locator("#record")).to_have_attribute("aria-pressed", "true")
    live.keyboard.down("ArrowUp")
    expect(live.locator("#commanded")).to_have_text("D")
    time.sleep(0.5)  # some frames of it
    downloads = []
    live.on("download", lambda download: downloads.append(download))
    with live.expect_event("download", lambda download: download.suggested_filename.endswith(".json")):
        live.keyboard.press("r")
    live.keyboard.up("ArrowUp")
    video, log = (tmp_path / download.suggested_filename for download in downloads)
    for download, path in zip(downloads, (video, log), strict=True):
        download.save_as(path)
    reader = decord.VideoReader(str(video))
    written = json.loads(log.read_text())
    assert video.suffix == ".mp4" and len(reader) == written["frames"] > 4
    assert reader[0].shape[:2] == (32, 48)
    assert written["seed"] == 11 and "D" in {signal for _, signal in written["shifts"]} <= set(CONTROL_TOKENS)
    expect(live.locator("#commanded")).to_have_text("N")
    live.evaluate(WATCH)  # a replay this short may be over before anybody has looked
    live.set_input_files("#replay", log)
    live.wait_for_function("() => seen.has('Replaying a control log') && seen.has('D')")
    expect(live.locator("#status")).to_have_text("You drive")  # after its end the drive goes on live
    expect(live.locator("#toasts")).to_be_empty()
