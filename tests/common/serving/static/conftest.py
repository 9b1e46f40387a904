"""A browser for the tests of the page, and a double of the server behind it."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.common.serving.live_server import PATIENCE
from tests.common.serving.static.browser import chromium
from tests.common.serving.static.fake_server import FakeServer

expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="module")  # Playwright keeps an event loop running, which other files' tests would meet
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def fake_server(browser: Browser) -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def console() -> Iterator[list[str]]:
    """What pages complain of, breaches of the content policy among it. At the end there has to be nothing, but for
    what the browser itself says when a test's server is gone."""
    lines: list[str] = []
    yield lines
    assert not [line for line in lines if "ERR_CONNECTION_REFUSED" not in line]


@pytest.fixture
def open_page(browser: Browser, console: list[str], request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """Opens an address, the double's by default, in a context of its own with the given options."""
    contexts = []

    def open_it(address: str | None = None, **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(address or request.getfixturevalue("fake_server").address)
        return page

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """The double's page on a desktop screen, as soon as it drives."""
    opened = open_page(viewport={"width": 1280, "height": 800})
    expect(opened.locator("#status")).to_have_text("You drive")
    return opened
