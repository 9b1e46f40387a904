"""Who is let in: tokens, pages of other servers, names that somebody pointed at this machine."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from common.serving import app as app_module
from common.serving import server as server_module
from common.serving.app import is_loopback, is_own_page
from tests.common.serving.live_server import PATIENCE

TOKEN = "correct horse battery"


def visit(server, query="", **headers):
    """A visit with these headers; the first message's type, or (code, reason) of the refusal."""

    async def run():
        async with server.player(query, additional_headers=headers) as player:
            message = await player.receive()
            return message["type"] if isinstance(message, dict) else message

    async def closed():
        async with server.player(query, additional_headers=headers) as player:
            return await player.closed()

    try:
        return asyncio.run(run())
    except InvalidStatus as error:
        return error.response.status_code
    except Exception:
        return asyncio.run(closed())


def test_a_token_is_needed_where_one_is_set(serve):
    server = serve(token=TOKEN)
    assert visit(server, "?token=correct%20horse%20battery") == "welcome"
    for query in (
        "",
        "?token=",
        "?token=wrong",
        "?token=correct%20horse%20batter%C3%BF",
        "?Token=correct%20horse%20battery",
    ):
        assert visit(server, query) == (1008, "a token is needed, and this is not it")
    assert server.room.clients == {}


@pytest.mark.parametrize("token", [None, TOKEN])
def test_only_pages_of_this_server_may_connect(serve, token):
    server = serve(token=token)
    query = "?token=correct%20horse%20battery" if token else ""
    assert visit(server, query, Origin=f"http://{server.address}") == "welcome"
    for origin in (
        "https://evil.example",
        f"http://{server.address}.evil.example",
        "null",
        "http://127.0.0.1",
        "http://[",
    ):
        assert visit(server, query, Origin=origin) == 403


def test_a_foreign_name_that_points_here_is_refused_without_a_token(serve):
    server = serve()

    def get(host):
        request = urllib.request.Request(f"http://{server.address}/recordings/x", headers={"Host": host})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=PATIENCE)
        return error.value.code

    assert [get(host) for host in ("localhost:9", "127.0.0.1", "[::1]:80")] == [404] * 3
    assert [get(host) for host in ("evil.example", "127.0.0.1.evil.example", "[", "")] == [403] * 4


def test_loopback_and_own_pages():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.evil")))
    assert is_own_page(None, "a:1") and is_own_page("http://a:1", "a:1") and is_own_page("https://A:1", "a:1")
    assert not any(is_own_page(origin, "a:1") for origin in ("http://a", "http://a:2", "null", "", "a:1"))
    assert not is_own_page("null", "")


def test_the_page_has_a_strict_policy(serve, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("<title>world</title>")
    (tmp_path / "player.js").write_text("1")
    monkeypatch.setattr(app_module, "STATIC", tmp_path)
    server = serve()
    for path in ("/", "/static/player.js"):
        with urllib.request.urlopen(f"http://{server.address}{path}", timeout=PATIENCE) as answer:
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/static/../app.py", "/static/..%2fapp.py", "/docs", "/openapi.json"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"http://{server.address}{path}", timeout=PATIENCE)
        assert error.value.code == 404


# The program


@pytest.mark.parametrize(
    "words, message",
    [
        ("--host 0.0.0.0", "can be reached by other machines: give a token"),
        ("--host ::", "can be reached by other machines"),
        ("--host example.org", "can be reached by other machines"),
        ("--token short", "--token: 12 characters or more"),
        ("--port 70000", "cannot listen at 127.0.0.1:70000"),
        ("--device gpu", "--device gpu: "),
        ("--num_inference_steps 8", "the model was distilled for 4"),
        ("--height 40", "40 does not fit; use 32 or 48"),
        ("--fps 0", "'0' is not a number of more than 0"),
        ("--clips {models}", "holds no .mp4 file"),
        ("--clips /nowhere", "there is no such directory"),
        ("--model_path {models}/stage2", "here belongs a streaming pipeline"),
        ("--model_path /nowhere", "no model directory at /nowhere"),
        ("--seed 9999999999999999999", "is the largest"),
    ],
)
def test_wrong_options_are_one_line(refused, tiny_models, monkeypatch, words, message):
    monkeypatch.setattr(server_module, "make_server", lambda *_: pytest.fail("served"))
    words = words.format(models=tiny_models).split()
    assert message in refused(server_module.main, "--model_path", tiny_models / "stage4", *words)


def test_a_port_that_is_taken_is_one_line(refused, tiny_models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(server_module.main, "--model_path", tiny_models / "stage4", "--port", port)
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in line


def connect_without_goodbye(port):
    """A WebSocket that is opened by hand and then left alone, as soon as somebody listens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    connection.sendall(
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert b"101" in connection.recv(100)
    return connection


@pytest.mark.slow
def test_the_program_ends_cleanly_when_it_is_terminated(tiny_models, tmp_path, free_port):
    """Even with a client that never says goodbye, and without leaving its temporary directory behind."""
    program = [sys.executable, "-m", "common.serving.server", "--model_path", str(tiny_models / "stage4")]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*program, "--port", str(free_port)],
        cwd=Path(__file__).parents[3],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with connect_without_goodbye(free_port):
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in said and f"stage4 at http://127.0.0.1:{free_port}" in said
    assert not list(tmp_path.glob("drives-*"))


def test_the_program_ends_cleanly_at_ctrl_c(tiny_models, monkeypatch, free_port):
    def interrupt():
        with connect_without_goodbye(free_port) as connection:
            connection.recv(10_000)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["server", "--model_path", str(tiny_models / "stage4"), "--port", str(free_port)])
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        server_module.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    thread.join(10)
    assert not any(thread.name == "recording" or "_make" in thread.name for thread in threading.enumerate())
