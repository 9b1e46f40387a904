"""Thirty times a server starts, a client drives, changes the prompt and records, and the server stops."""

import asyncio
import ctypes
import functools
import gc
import os
import sys
import threading
import typing
from pathlib import Path

import psutil
import pytest

from common.serving.app import create_app
from common.serving.model import Start
from common.serving.room import Room
from common.serving.server import listen, make_server
from tests.common.serving.live_server import Player

CYCLES, WARM_UP = 30, 10
# Memory in use, not the process's size (RSS): that grew by 30 to 190 KiB a cycle over the first hundred cycles and by
# less than 12 over the last two hundred of four hundred, all of it free memory in glibc's arenas. Every cycle's threads
# get one of these, and each grows until it has once held a whole shift; malloc_trim leaves the ends of them. Memory in
# use grew by .3 to .6 KiB a cycle, later by .2: what FastAPI keeps of each app's endpoints.
KIBIBYTES_A_CYCLE = 3  # a frame of the tiny model has 4.5
OBJECTS_A_CYCLE = 40


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2, summed over all arenas."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def kibibytes_in_use():
    """What malloc has given out: tensors, pictures, buffers and the larger Python objects; 0 where it does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # since glibc 2.33
    if mallinfo is None:
        return 0.0
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return (info.uordblks + info.hblkhd) / 1024


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
    # FastAPI remembers every handler it has looked at, and with it the app, and typing remembers annotations: many
    # apps are the test's own doing.
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("fastapi.") else ():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    for clear in typing._cleanups:
        clear()
    gc.collect()
    return {
        # but for the event loop's own pool, which grows to its size when it likes
        "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")),
        "tasks": len(asyncio.all_tasks()),
        "files": len(list(Path(f"/proc/{os.getpid()}/fd").iterdir())),
        "processes": len(psutil.Process().children()),
        "kibibytes": kibibytes_in_use(),
        "objects": sys.getallocatedblocks(),
    }


@pytest.mark.slow
def test_many_starts_and_stops_leak_no_thread_task_file_or_memory(tiny_world_model, tmp_path, monkeypatch):
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
    kibibytes, objects = ((after.pop(name) - before.pop(name)) / CYCLES for name in ("kibibytes", "objects"))
    assert after == before
    assert kibibytes < KIBIBYTES_A_CYCLE and objects < OBJECTS_A_CYCLE, f"{kibibytes:.1f} KiB, {objects:.0f} objects"
    assert not list(tmp_path.iterdir())
