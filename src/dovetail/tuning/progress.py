"""What `dovetail tune` shows while it works: on a terminal one line, elsewhere a line per trial."""

import os
import sys
from typing import TextIO

from dovetail.ir.units import format_duration
from dovetail.tuning.clock import Tick


class TuneProgress:
    """Best so far against the untuned plan and against the bound, and the time that is left.

    ``bound`` is the bound's share of the untuned plan's measured time.
    """

    def __init__(self, budget: float, bound: float, stream: TextIO | None = None) -> None:
        self._budget, self._bound = budget, bound
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()

    def __call__(self, tick: Tick) -> None:
        """Show a trial; a stream that fails ends the display, not the tuning."""
        left = max(0.0, self._budget - tick.spent)
        line = (
            f"best {tick.best:.3f} of the untuned time (bound {self._bound:.3f}), {tick.timed} "
            f"timed, {tick.ruled_out} ruled out, {format_duration(left)} left"
        )
        try:
            if self._terminal:
                text = f"{tick.phase}: {line}; trial {tick.trial}: {tick.text}"
                self._stream.write(f"\r{text[: self._columns() - 1]}\x1b[K")
            else:
                self._stream.write(f"{tick.phase}: trial {tick.trial}: {tick.text}; {line}\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._terminal = False

    def close(self) -> None:
        """Leave the line behind."""
        if self._terminal:
            self._stream.write("\n")

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            return 80
