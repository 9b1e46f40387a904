"""Fixtures: a real server and a client to talk to it (live_server.py), pages in a headless Chromium (browser.py)."""

from collections.abc import Callable, Iterator

import pytest

from tests.common.serving.live_server import play, serve, tiny_world_model  # noqa: F401  fixtures

# Playwright is imported where it is used: the server's own tests do without.


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from tests.common.serving.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def fake_server() -> Iterator:
    from tests.common.serving.fake_server import FakeServer

    with FakeServer() as server:
        yield server


@pytest.fixture
def open_page(browser, request) -> Iterator[Callable]:
    """open_page(address, **options of a browser context) → a page; by default that of the fake server."""
    contexts = []

    def open_(address: str | None = None, **options):
        contexts.append(browser.new_context(**({"accept_downloads": True} | options)))
        page = contexts[-1].new_page()
        page.goto(address or request.getfixturevalue("fake_server").address)
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page):
    return open_page()
