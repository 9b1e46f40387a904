"""A hundred times a server starts, a client drives, changes the prompt and records, and the server stops."""

import asyncio
import functools
import gc
import os
import sys
import threading
from pathlib import Path

import psutil
import pytest

from common.serving.app import create_app
from common.serving.model import Start
from common.serving.room import Room
from common.serving.server import listen, make_server
from tests.common.serving.live_server import Player

CYCLES, WARM_UP = 100, 10
MEBIBYTES = 8.0  # of noise in what the allocator gives back; a cycle that leaked a frame's pixels would stay below …
KIBIBYTES_A_CYCLE = 80  # … so the slope is bounded as well


async def cycle(model, number):
    """One life of a server, in this loop, so that its tasks can be counted."""
    from websockets.asyncio.client import connect

    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    app = create_app(lambda: Room(model.info, lambda progress: model, Start("a red car", number)))
    server = make_server(app)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[listener])
    async with connect(f"ws://127.0.0.1:{port}/ws", compression=None, proxy=None, max_queue=None) as socket:
        player = Player(socket)
        await player.signal("D")
        await player.send(type="prompt", prompt="snow")
        await player.frame()
        if number % 10 == 0:
            await player.send(type="record", on=True)
            await player.frame()
    while server.server_state.connections:  # uvicorn itself would look only every tenth of a second
        await asyncio.sleep(0.002)
    await server.shutdown(sockets=[listener])
    listener.close()


def held():
    # FastAPI remembers every handler it has looked at, and with it the app: a hundred apps are the test's own doing.
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("fastapi.") else ():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    gc.collect()
    return {
        # but for the event loop's own pool, which grows to its size when it likes
        "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")),
        "tasks": len(asyncio.all_tasks()),
        "files": len(list(Path(f"/proc/{os.getpid()}/fd").iterdir())),
        "processes": len(psutil.Process().children()),
        "mebibytes": psutil.Process().memory_info().rss / 2**20,
    }


@pytest.mark.slow
def test_a_hundred_starts_and_stops_leak_no_thread_task_file_or_megabyte(tiny_world_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    async def run():
        for number in range(WARM_UP):
            await cycle(tiny_world_model, number)
        before = held()
        for number in range(CYCLES):
            await cycle(tiny_world_model, number)
        return before, held()

    before, after = asyncio.run(asyncio.wait_for(run(), 300))
    grown = after.pop("mebibytes") - before.pop("mebibytes")
    assert after == before
    assert grown < min(MEBIBYTES, KIBIBYTES_A_CYCLE * CYCLES / 1024), f"{grown:.1f} MiB"
    assert not list(tmp_path.iterdir())
