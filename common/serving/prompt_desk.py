"""Prompts are encoded in a thread of their own, so that the picture does not stand still meanwhile."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from common.config.errors import one_line
from common.serving.model import TextEmbeds, WorldModel

logger = logging.getLogger(__name__)


class PromptDesk:
    """Takes requests, holds the newest one's result until the world fetches it. All methods return at once.

    Args:
        condition: guards all state.
        on_error: told in one line, from the desk's thread, that a prompt could not be encoded.
    """

    def __init__(self, condition: threading.Condition, on_error: Callable[[str], None]):
        self._condition, self._on_error = condition, on_error
        self._newest = 0
        self._ready: tuple[str, TextEmbeds] | None = None
        self._thread = ThreadPoolExecutor(1, "prompt")

    def ask(self, prompt: str, model: WorldModel) -> None:
        with self._condition:
            self._newest += 1
            self._thread.submit(self._encode, prompt, model, self._newest)

    def forget(self) -> None:
        """Whatever was asked for is not wanted any more."""
        with self._condition:
            self._newest += 1
            self._ready = None

    def take(self) -> tuple[str, TextEmbeds] | None:
        """The prompt to change to, once."""
        with self._condition:
            ready, self._ready = self._ready, None
            return ready

    def close(self) -> None:
        self.forget()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _encode(self, prompt: str, model: WorldModel, request: int) -> None:
        if request != self._newest:
            return
        try:
            embeds = model.encode(prompt)
        except Exception as error:
            logger.exception("a prompt could not be encoded")
            self._on_error(f"the prompt could not be read: {one_line(error)[:200]}")
            return
        with self._condition:
            if request == self._newest:
                self._ready = prompt, embeds
