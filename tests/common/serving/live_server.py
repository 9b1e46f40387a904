"""A real server on a free port of this machine, with a tiny untrained model, and a client to talk to it."""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager

import pytest

from common.serving.app import create_app
from common.serving.model import ModelOptions, Start, WorldModel, inspect_model
from common.serving.protocol import unpack_frame
from common.serving.room import Room
from common.serving.server import listen, make_server

PATIENCE = 40.0  # seconds until a test gives up; other processes may have the machine


@pytest.fixture(scope="session")
def tiny_world_model(tiny_models):
    """The model of stage 4 at 64 frames a second, loaded once for all tests, and what is known of it."""
    options = ModelOptions(str(tiny_models / "stage4"), device="cpu", fps=64.0)
    info = inspect_model(options)
    return WorldModel.load(options, info, lambda *_: None)


class Player:
    """A client's view: what it was told so far, and waiting for more."""

    def __init__(self, socket):
        self.socket, self.frames, self.told, self.status, self.last_id = socket, [], [], {}, 0

    async def send(self, **message):
        await self.socket.send(json.dumps(message))

    async def signal(self, name):
        self.last_id += 1
        await self.send(type="signal", signal=name, id=self.last_id, time=1.5)

    async def receive(self):
        """One message: (header, JPEG) of a frame or a dict."""
        message = await asyncio.wait_for(self.socket.recv(), PATIENCE)
        if isinstance(message, bytes):
            self.frames.append(unpack_frame(message))
            return self.frames[-1]
        message = json.loads(message)
        self.told.append(message)
        if message["type"] == "status":
            self.status = message
        return message

    async def until(self, kind, **values):
        """The next message of this type with these values."""
        while True:
            message = await self.receive()
            if isinstance(message, dict) and message["type"] == kind and values.items() <= message.items():
                return message

    async def shows(self, **values):
        """The newest status, as soon as it has these values."""
        while not values.items() <= self.status.items():
            await self.receive()
        return self.status

    async def frame(self, matches=lambda header: True):
        """The next frame whose header matches."""
        while True:
            message = await self.receive()
            if isinstance(message, tuple) and matches(message[0]):
                return message

    async def refused(self, **message):
        """Sends what has to be answered with an error; its text."""
        await self.send(**message)
        return (await self.until("error"))["message"]

    async def closed(self):
        """Waits for the server to close; (code, reason)."""
        from websockets.exceptions import ConnectionClosed

        try:
            while True:
                await self.receive()
        except ConnectionClosed as end:
            return end.rcvd.code, end.rcvd.reason

    async def new_stream(self, matches=lambda header: True, **message):
        """Sends a reset or replay; the number of the stream that it starts."""
        old = (await self.frame())[0].stream
        await self.send(**({"type": "reset"} | message))
        return (await self.frame(lambda header: header.stream > old))[0].stream


class LiveServer:
    """uvicorn in a thread."""

    def __init__(self, make_room, token=None):
        listener = listen("127.0.0.1", 0)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.app = create_app(make_room, token)
        self.server = make_server(self.app)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.005)

    @property
    def room(self):
        return self.app.state.room

    @asynccontextmanager
    async def player(self, query="", **options):
        from websockets.asyncio.client import connect

        options = {"compression": None, "proxy": None, "max_queue": None, "close_timeout": 1} | options
        async with connect(f"ws://{self.address}/ws{query}", **options) as socket:
            yield Player(socket)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(tiny_world_model):
    """Starts servers; all are stopped at the test's end."""
    servers = []

    def start(load=None, token=None, info=None, **room_options):
        info = info or tiny_world_model.info

        def make_room():
            return Room(info, load or (lambda progress: tiny_world_model), Start("a red car", 7), **room_options)

        servers.append(LiveServer(make_room, token))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def play(serve):
    """Runs `scenario(player, server)` against a new server."""

    def run(scenario, server=None, **options):
        server = server or serve(**options)

        async def visit():
            async with server.player() as player:
                return await asyncio.wait_for(scenario(player, server), 3 * PATIENCE)

        return asyncio.run(visit())

    return run
