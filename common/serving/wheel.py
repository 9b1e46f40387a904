"""Who drives: one client at a time, the others watch or wait their turn. No network and no clock in here."""


class Wheel:
    """The wheel, the queue for it, and who only watches. Times are seconds of any one clock.

    Who comes while nobody drives gets the wheel. When the driver leaves, it goes to who waits longest, else to who has
    watched longest without having given it back.

    Args:
        idle_seconds: a driver who does nothing for so long loses the wheel as soon as somebody waits for it.
    """

    def __init__(self, idle_seconds: float):
        self.idle_seconds = idle_seconds
        self.driver: int | None = None
        self.waiting: list[int] = []
        self._watching: list[int] = []  # would take it unasked
        self._last_active = 0.0

    def join(self, client: int, now: float) -> None:
        self._watching.append(client)
        if self.driver is None:
            self._pass_on(now)

    def leave(self, client: int, now: float) -> None:
        self._forget(client)
        if self.driver == client:
            self._pass_on(now)

    def take(self, client: int, now: float) -> None:
        """Drives at once if nobody does, else waits."""
        if client == self.driver or client in self.waiting:
            return
        self._forget(client)
        self.waiting.append(client)
        if self.driver is None:
            self._pass_on(now)

    def release(self, client: int, now: float) -> None:
        """Only watches from now on, and is not given the wheel until it asks."""
        self.leave(client, now)  # the wheel does not know who is there, only who would drive

    def active(self, now: float) -> None:
        """The driver did something."""
        self._last_active = now

    def expire(self, now: float) -> None:
        """Takes the wheel from an idle driver if somebody waits; the idle one watches."""
        if self.waiting and self.driver is not None and now - self._last_active >= self.idle_seconds:
            self._watching.append(self.driver)
            self._pass_on(now)

    def _forget(self, client: int) -> None:
        for group in (self.waiting, self._watching):
            if client in group:
                group.remove(client)

    def _pass_on(self, now: float) -> None:
        group = self.waiting or self._watching
        self.driver = group.pop(0) if group else None
        self._last_active = now
