"""Stopping on SIGTERM and SIGINT between two steps, on all processes at the same step."""

import signal
import time
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IMPATIENT_AFTER_SECONDS = 3.0


class StopRequest:
    """Within the `with` block SIGTERM and SIGINT only leave a note; `agreed` tells whether any process got one.

    A second Ctrl-C interrupts at once, unless it comes within seconds of the first: one key press may arrive twice,
    from the terminal and from a launcher that hands it on.
    """

    def __enter__(self) -> "StopRequest":
        self.received: list[float] = []  # when
        self.group: dist.ProcessGroup | None = None
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def connect(self) -> None:
        """Makes `agreed` ask the other processes too, once they have met."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Through the CPU: asking must not wait for the GPUs, as a collective of NCCL would.
            self.group = dist.new_group(backend="gloo")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received and now - self.received[0] > IMPATIENT_AFTER_SECONDS:
            raise KeyboardInterrupt
        self.received.append(now)

    def agreed(self) -> bool:
        """True on every process as soon as one has been asked to stop. All processes call it at every step."""
        if self.group is None:
            return bool(self.received)
        asked = torch.tensor([len(self.received)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        return bool(asked.item())
