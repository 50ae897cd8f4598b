"""Progress of long work: one line that updates on a terminal, plain lines now and then elsewhere.

Own code rather than tqdm, which writes carriage returns into log files and knows one rate only.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Self, TextIO

from dovetail.ir.units import format_bytes, format_duration

# Runs shorter than this show nothing.
_QUIET_SECONDS = 2.0
_TERMINAL_INTERVAL = 0.2
# The recent rate is over this long: several decode steps of a large batch.
_RECENT_SECONDS = 15.0


class LiveLine:
    """Counts what is done of a total, and shows it; what a line says is the subclass's.

    Call it from one thread. A stream that fails (a closed terminal) ends the display, not the work.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        *,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        ``stream`` is standard error by default; where it is no terminal, a line comes at most every
        ``interval`` seconds.
        """
        self._total = total
        self._done = 0
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = _TERMINAL_INTERVAL if self._terminal else interval
        self._clock = clock
        self._started = self._shown_at = clock()
        self._shown = False
        self._recent = deque([(self._started, 0)])

    def count(self, done: int) -> None:
        """Count what was done besides, and show a line if one is due."""
        self._done += done
        now = self._clock()
        self._recent.append((now, self._done))
        # The oldest sample kept is the last one that is old enough.
        while len(self._recent) > 2 and self._recent[1][0] <= now - _RECENT_SECONDS:
            self._recent.popleft()
        since_shown = now - self._shown_at
        if now - self._started >= _QUIET_SECONDS and since_shown >= self._interval:
            self._show(now)

    def close(self) -> None:
        """Show the last line, unless the run was too short for any."""
        now = self._clock()
        if self._shown or now - self._started >= _QUIET_SECONDS:
            self._show(now)
            if self._terminal:
                self._write("\n")
        self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _show(self, now: float) -> None:
        self._shown = True
        self._shown_at = now
        line = self._line(now)
        if self._terminal:
            # Erased to the right (ESC [K) and never wrapped, so that it stays one line.
            self._write(f"\r{line[: self._columns() - 1]}\x1b[K")
        else:
            self._write(line + "\n")

    def _line(self, now: float) -> str:
        raise NotImplementedError

    def _mean_rate(self, now: float) -> float:
        return _rate(self._done, now - self._started)

    def _recent_rate(self, now: float) -> float:
        then, done_then = self._recent[0]
        return _rate(self._done - done_then, now - then)

    def _end(self, now: float, finished: bool) -> str:
        """How long it took, or how long it will."""
        if finished:
            return f"took {format_duration(now - self._started)}"
        # The mean: prefill and decode take turns, and the recent rate would swing with them.
        if mean := self._mean_rate(now):
            return f"ETA {format_duration(max(0, self._total - self._done) / mean)}"
        return "ETA unknown"

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns if self._stream else 80
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # ValueError is a write to a closed file; neither may end hours of work.
            self._stream = None


class Progress(LiveLine):
    """Counts prompts and new tokens, and shows them with the recent and mean rate and an ETA."""

    def __init__(
        self,
        total_prompts: int,
        total_tokens: int,
        stream: TextIO | None = None,
        *,
        done_prompts: int = 0,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock: ``total_tokens`` is the most new tokens that this run can take;
        ``done_prompts`` were finished by an earlier one."""
        super().__init__(total_tokens, stream, interval=interval, clock=clock)
        self._total_prompts = total_prompts
        self._prompts = done_prompts

    def add(self, prompts: int = 0, tokens: int = 0, *, saved: int = 0) -> None:
        """Count finished prompts and new tokens, and show a line if one is due.

        ``saved`` tokens will not be needed after all, because a prompt stopped early: they leave
        the total, so that the ETA follows.
        """
        self._prompts += prompts
        self._total -= saved
        self.count(tokens)

    def _line(self, now: float) -> str:
        return (
            f"{self._prompts}/{self._total_prompts} prompts, {self._done} new tokens, "
            f"{self._recent_rate(now):.1f} tok/s (mean {self._mean_rate(now):.1f}), "
            f"{self._end(now, self._prompts >= self._total_prompts)}"
        )


class BytesProgress(LiveLine):
    """Counts bytes, and shows them with the recent rate and an ETA."""

    def _line(self, now: float) -> str:
        return (
            f"{format_bytes(self._done)} of {format_bytes(self._total)}, "
            f"{format_bytes(round(self._recent_rate(now)))}/s, "
            f"{self._end(now, self._done >= self._total)}"
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
