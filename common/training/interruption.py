"""Stopping on SIGTERM and SIGINT between two steps, on all processes at the same step."""

import signal
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within the `with` block SIGTERM and SIGINT only leave a note; `agreed` tells whether any process got one.

    A second SIGINT (Ctrl-C pressed again) interrupts at once.
    """

    def __enter__(self) -> "StopRequest":
        self.received: list[int] = []
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
        if number == signal.SIGINT and self.received.count(number) >= 1:
            raise KeyboardInterrupt
        self.received.append(number)

    def agreed(self) -> bool:
        """True on every process as soon as one has been asked to stop. All processes call it at every step."""
        if self.group is None:
            return bool(self.received)
        asked = torch.tensor([len(self.received)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        return bool(asked.item())
