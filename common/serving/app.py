"""The web application: the page, the recordings, and the WebSocket, and who is let in.

On this machine alone no token is needed; but any website open in a browser here could try the WebSocket, so Origin and
Host are checked: a page may connect only to the server that it came from, and that server only under this machine's
own names (else a name that somebody points at 127.0.0.1 would do).
"""

import contextlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles

from common.serving.room import Room

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the page's address may hold the token
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """True for the names of this machine that no other one can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(netloc: str) -> str:
    """`name` of name:port; "" if it is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_own_page(origin: str | None, host: str) -> bool:
    """Whether a browser's request comes from a page of this very server. Other programs send no Origin."""
    if origin is None:
        return True
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def is_token(given: str, token: str) -> bool:
    """Takes equally long wherever the two differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def create_app(make_room: Callable[[], Room], token: str | None = None) -> FastAPI:
    """The application. A room is made when it starts and closed when it stops; `app.state.room` holds it.

    Args:
        make_room: cheap; models are loaded later.
        token: what a client has to know; None lets everybody on this machine in.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.room = room = make_room()
        await room.open()
        try:
            yield
        finally:
            await room.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    is_known_host = (lambda host: True) if token else (lambda host: is_loopback(host_name(host)))

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable) -> Response:
        if not is_known_host(request.headers.get("host", "")):
            return PlainTextResponse("this server answers to localhost only", 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def page() -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    @app.get("/recordings/{name}")
    def recording(name: str) -> Response:
        file = app.state.room.store.find(name)
        if file is None:
            return PlainTextResponse("there is no such recording; the server keeps only the newest", 404)
        return FileResponse(file, filename=f"drive-{name[:8]}{file.suffix}")

    @app.websocket("/ws")
    async def connect(websocket: WebSocket) -> None:
        host = websocket.headers.get("host", "")
        if not is_known_host(host) or not is_own_page(websocket.headers.get("origin"), host):
            await websocket.close(1008)  # before it is accepted: HTTP status 403
            return
        await websocket.accept()
        if token and not is_token(websocket.query_params.get("token", ""), token):
            await websocket.close(1008, "a token is needed, and this is not it")  # a browser shows this, but no 403
            return
        await app.state.room.serve(websocket)

    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False))
    return app
