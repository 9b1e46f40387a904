"""Several clients, and bad ones: the wheel, who does not read, garbage, and who leaves in the middle of it."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace

import pytest

from common.serving import room
from common.serving.client_session import MISTAKES_FORGIVEN
from common.serving.commands import obey
from common.serving.protocol import MAX_REPLAY_BYTES


def together(server, scenario):
    """Runs `scenario(first, second)` with two clients, in the order of their coming."""

    async def visit():
        async with asyncio.timeout(60), server.player() as first:
            await first.until("welcome")
            async with server.player() as second:
                await second.until("welcome")
                await scenario(first, second)

    asyncio.run(visit())


def test_one_drives_the_other_watches_and_takes_over(serve):
    async def scenario(first, second):
        await first.shows(you_drive=True)
        await second.shows(you_drive=False, waiting=0)
        await second.frame()
        for message in (
            {"type": "prompt", "prompt": "x"}, {"type": "reset"}, {"type": "pause", "paused": True},
            {"type": "record", "on": True}, {"type": "signal", "signal": "B", "id": 9, "time": 1},
        ):  # fmt: skip
            assert "only the driver" in await second.refused(**message)
        await first.signal("D")
        await first.frame(lambda header: header.signal_id == 1)
        header, _ = await second.frame(lambda header: header.signal == 0)
        assert header.signal_id == 0  # the id means something to the driver alone
        await second.send(type="wheel", take=True)
        await second.shows(waiting=1)
        await first.shows(you_drive=True)
        await first.send(type="wheel", take=False)
        await first.shows(you_drive=False)
        await second.shows(you_drive=True, waiting=0)
        assert (await second.frame(lambda header: header.signal == 6))[0].signal_id == 0  # neutral until it acts
        await second.signal("DR")
        await second.frame(lambda header: header.signal_id == 1 and header.signal == 2)

    together(serve(), scenario)


def test_the_wheel_passes_on_when_the_driver_vanishes_and_a_pause_ends_with_it(serve):
    async def scenario(first, second):
        await first.signal("B")
        await second.frame(lambda header: header.signal == 3)
        await first.send(type="pause", paused=True)
        await second.shows(state="paused")
        first.socket.transport.abort()
        await second.shows(you_drive=True, state="running")
        await second.frame(lambda header: header.signal == 6)

    together(serve(), scenario)


def test_an_idle_driver_loses_the_wheel_only_when_somebody_waits(serve, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=time.perf_counter)
    clock.monotonic = lambda: clock.now
    for module in ("room", "commands"):
        monkeypatch.setattr(f"common.serving.{module}.time", clock)
    server = serve(idle_seconds=50)

    async def scenario(first, second):
        async def does(player, signal, seconds_later):
            await player.signal(signal)
            await player.send(type="ping", time=0)
            await player.until("pong")  # the server has heard the signal
            clock.now += seconds_later
            await asyncio.sleep(0.3)  # it looks at the clock four times a second

        await does(first, "D", 80)
        await second.send(type="wheel", take=True)
        await second.shows(you_drive=True)
        await first.shows(you_drive=False, waiting=0)
        await first.send(type="wheel", take=True)
        for name in ["D", "N"] * 2:  # who does something keeps it
            await does(second, name, 40)
        assert server.room.wheel.driver == 2
        await does(second, "N", 11)  # the same again is no sign of life
        await first.shows(you_drive=True)

    together(server, scenario)


def test_who_does_not_read_delays_nobody_and_loses_frames(serve):
    server = serve()
    # Small buffers in both kernels, or tiny frames would fill them for minutes.
    server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    async def visit():
        host, port = server.address.split(":")
        pipe = socket.socket()
        pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pipe.connect((host, int(port)))
        async with server.player() as reader, server.player(sock=pipe) as sleeper:
            await sleeper.until("welcome")
            sleeper.socket.transport.pause_reading()
            session = server.room.clients[2]
            while session.dropped < 30:
                await reader.frame()
            assert len(session._frames) <= 8
            numbers = [header.number for header, _ in reader.frames]
            assert numbers == sorted(set(numbers)) and server.room.clients[1].dropped < 30
            # Nothing is missing here but what a machine at work on other things has had dropped.
            assert numbers[-1] - numbers[0] + 1 - len(numbers) <= server.room.clients[1].dropped
            sleeper.socket.transport.resume_reading()
            while (await sleeper.until("stats"))["dropped"] < 30:
                pass

    asyncio.run(asyncio.wait_for(visit(), 60))


def test_mistakes_are_answered_and_too_many_close_this_socket_only(serve):
    async def scenario(first, second):
        await first.signal("D")
        assert "id 1 comes after 1" in await first.refused(type="signal", signal="D", id=1, time=0)
        assert "ids have to rise" in await first.refused(type="signal", signal="DL", id=0, time=0)
        assert "known are D, DL" in await first.refused(type="signal", signal="UP", id=5, time=0)
        await first.frame(lambda header: header.signal_id == 1)
        for text in ["{", "[" * 3000, '{"type":"ping","time":NaN}', b"\x00" * 100]:
            await first.socket.send(text)
            await first.until("error")
        for _ in range(MISTAKES_FORGIVEN + 1):
            await second.socket.send('{"type":"nonsense"}')
        assert await second.closed() == (1008, "too many wrong messages")
        await first.send(type="ping", time=1)
        await first.until("pong")
        await first.frame()

    together(serve(), scenario)


def test_a_failure_of_the_servers_own_is_logged_and_closes_this_socket_only(serve, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no such luck")

    async def scenario(first, second):
        monkeypatch.setattr(room, "obey", fails)
        await second.send(type="ping", time=1)
        assert await second.closed() == (1011, "the server failed at this; its log says why")
        monkeypatch.setattr(room, "obey", obey)
        await first.send(type="ping", time=1)
        await first.until("pong")
        await first.frame()

    together(serve(), scenario)
    (record,) = (record for record in caplog.records if record.name == room.logger.name)
    assert record.levelname == "ERROR" and "no such luck" in str(record.exc_info[1])


def test_floods_and_oversized_messages_close_this_socket_only(serve):
    async def scenario(first, second):
        for _ in range(400):
            await second.socket.send('{"type":"ping","time":1}')
        assert await second.closed() == (1008, "too many messages")
        await first.socket.send(json.dumps({"type": "prompt", "prompt": "x"}) + " " * 10_000)
        assert "4096 are the most" in (await first.until("error"))["message"]
        await first.frame()
        await first.socket.send("x" * (MAX_REPLAY_BYTES + 5000))
        assert (await first.closed())[0] == 1009

    server = serve()
    together(server, scenario)
    assert server.room.engine._threads[0].is_alive()


def test_clients_that_leave_in_the_middle_of_anything_leave_nothing_behind(serve):
    server = serve()

    async def visit():
        for goodbye in range(8):
            async with server.player() as player:
                if goodbye % 4:
                    await player.frame()
                if goodbye % 4 == 2:
                    await player.send(type="reset", seed=goodbye)
                if goodbye % 4 == 3:
                    await player.send(type="record", on=True)
                if goodbye % 2:
                    player.socket.transport.abort()
        async with server.player() as player:
            await player.shows(you_drive=True, state="running", recording=False)
            await player.frame()
            assert list(server.room.clients) == [9]

    asyncio.run(asyncio.wait_for(visit(), 60))


def test_too_many_clients_are_sent_away(serve, monkeypatch):
    monkeypatch.setattr("common.serving.room.MAX_CLIENTS", 1)

    async def visit():
        async with server.player() as first:
            await first.until("welcome")
            async with server.player() as second:
                assert await second.closed() == (1013, "the room is full")

    server = serve()
    asyncio.run(visit())


@pytest.mark.parametrize(
    "bytes_", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00", b"\x00" * 4096, b"GET /ws HTTP/1.1\r\n"]
)
def test_what_is_no_websocket_at_all_harms_nothing(serve, bytes_):
    server = serve()
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(bytes_)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        connection.recv(4096)

    async def visit():
        async with server.player() as player:
            await player.frame()

    asyncio.run(asyncio.wait_for(visit(), 30))
