"""Fixtures for all tests of the live player: a real server and a client to talk to it."""

from tests.common.serving.live_server import play, serve, tiny_world_model  # noqa: F401  fixtures
