"""Progress of a batch run: one line that updates on a terminal, plain lines now and then elsewhere.

Own code rather than tqdm, which writes carriage returns into log files and knows one rate only.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Self, TextIO

from dovetail.ir.units import format_duration

# Runs shorter than this show nothing.
_QUIET_SECONDS = 2.0
_TERMINAL_INTERVAL = 0.2
# The recent rate is over this long: several decode steps of a large batch.
_RECENT_SECONDS = 15.0


class Progress:
    """Counts prompts and new tokens, and shows them with the recent and mean rate and an ETA.

    Call it from one thread. A stream that fails (a closed terminal) ends the display, not the run.
    """

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
        """Start the clock.

        ``total_tokens`` is the most new tokens that this run can take; ``done_prompts`` were
        finished by an earlier one. ``stream`` is standard error by default; where it is no
        terminal, a line comes at most every ``interval`` seconds.
        """
        self._total_prompts = total_prompts
        self._total_tokens = total_tokens
        self._prompts = done_prompts
        self._tokens = 0
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = _TERMINAL_INTERVAL if self._terminal else interval
        self._clock = clock
        self._started = self._shown_at = clock()
        self._shown = False
        self._recent = deque([(self._started, 0)])

    def add(self, prompts: int = 0, tokens: int = 0, *, saved: int = 0) -> None:
        """Count finished prompts and new tokens, and show a line if one is due.

        ``saved`` tokens will not be needed after all, because a prompt stopped early: they leave
        the total, so that the ETA follows.
        """
        self._prompts += prompts
        self._tokens += tokens
        self._total_tokens -= saved
        now = self._clock()
        self._recent.append((now, self._tokens))
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
        elapsed = now - self._started
        mean = _rate(self._tokens, elapsed)
        then, tokens_then = self._recent[0]
        recent = _rate(self._tokens - tokens_then, now - then)
        left = max(0, self._total_tokens - self._tokens)
        if self._prompts >= self._total_prompts:
            end = f"took {format_duration(elapsed)}"
        elif mean:
            # The mean: prefill and decode take turns, and the recent rate would swing with them.
            end = f"ETA {format_duration(left / mean)}"
        else:
            end = "ETA unknown"
        return (
            f"{self._prompts}/{self._total_prompts} prompts, {self._tokens} new tokens, "
            f"{recent:.1f} tok/s (mean {mean:.1f}), {end}"
        )

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


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
