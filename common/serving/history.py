"""Which signal every window shift read: what a stream's control log is made of, and what a replay follows."""

from bisect import bisect_right

from common.serving.model import ModelInfo, Start
from common.serving.protocol import MAX_CHANGES, MAX_PROMPT_CHANGES, VERSION, ControlLog


class History:
    """One stream's signals and prompts by shift, from its beginning on. Written by the thread that makes the stream.

    Only changes are kept, and no more of them than a log can hold, so it stays small however long the stream runs.

    Args:
        start: if it has a log, that is followed to its end.

    Attributes:
        settings: of the stream, for its log; who starts it from a clip says which, see `ModelInfo.settings_from`.
    """

    def __init__(self, info: ModelInfo, start: Start):
        self.info, self.start, self.settings = info, start, info.settings
        self.shift = self.num_frames = 0  # made so far
        self.read_shift = -1  # the last one that has read its signal
        self.is_complete = True
        self._signals: list[tuple[int, str | None]] = []
        self._prompts: list[tuple[int, str]] = []
        log = start.log
        self._replay_end = log.end if log else 0
        self._replay_shifts, self._replay_signals = zip(*sorted_changes(log), strict=True) if log else ((), ())

    @property
    def is_replaying(self) -> bool:
        return self.shift < self._replay_end

    def replayed_signal(self) -> str | None:
        """What the log says for this shift; before its first entry nothing was held."""
        place = bisect_right(self._replay_shifts, self.shift) - 1
        return self._replay_signals[place] if place >= 0 else None

    def replayed_prompt(self) -> str | None:
        """The prompt that the log changes to at this shift, if it does."""
        if not self.is_replaying:
            return None
        found = [prompt for shift, prompt in self.start.log.prompts if shift == self.shift]
        return found[-1] if found else None

    def note_signal(self, signal: str | None) -> None:
        """This shift has read `signal`."""
        self.read_shift = self.shift
        if not self._signals or self._signals[-1][1] != signal:
            self._append(self._signals, signal, MAX_CHANGES)

    def note_prompt(self, prompt: str) -> None:
        """From this shift on the stream is told `prompt`."""
        self._append(self._prompts, prompt, MAX_PROMPT_CHANGES)

    def _append(self, changes: list, value: str | None, limit: int) -> None:
        if len(changes) < limit:
            changes.append((self.shift, value))
        else:
            self.is_complete = False

    def log(self, end: int, first_frame: int, frames: int) -> ControlLog:
        """The log of the first `end` shifts, for a video of `frames` frames from number `first_frame` on."""
        return ControlLog(
            version=VERSION,
            model=self.info.name,
            settings=self.settings,
            seed=self.start.seed,
            prompt=self.start.prompt,
            start=self.start.start,
            fps=self.info.fps,
            shifts=[change for change in list(self._signals) if change[0] < end],
            prompts=[change for change in list(self._prompts) if change[0] < end],
            end=end,
            complete=self.is_complete,
            first_frame=first_frame,
            frames=frames,
            height=self.info.height,
            width=self.info.width,
        )


def sorted_changes(log: ControlLog) -> list[tuple[int, str | None]]:
    """A log's signal changes in the order of their shifts; without any, nothing was held from the beginning on."""
    return sorted(log.shifts, key=lambda change: change[0]) or [(0, None)]
