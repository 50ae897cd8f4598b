"""Kernels and their default on one device, timed in turn."""

import statistics
from collections.abc import Callable

from dovetail.ir import codec
from dovetail.ir.kernel_layer import LayerKernels
from dovetail.kernels.bench import Bench, Loaded
from dovetail.tuning.gate import MOST_PAIRS, decided
from dovetail.tuning.kernels.attempts import Attempts
from dovetail.tuning.kernels.rows import Pairs, ratios

RENEWED = 4
"""Pairs of the gate after which both are loaded anew, so that no lucky place in memory decides."""
THROTTLED = 1.5
"""A pair in which the default takes this many times its median is not used."""


class Duel:
    """Times kernels in turn with ``default``. ``make`` gives the device's bench, which is asked for
    only once there is something to time. Methods raise KernelFailure."""

    def __init__(
        self, default: LayerKernels, make: Callable[[], Bench], attempts: Attempts
    ) -> None:
        self._kernels, self._make, self._attempts = default, make, attempts
        self._bench: Bench | None = None
        self._default: Loaded | None = None
        self._paces: list[float] = []

    def load(self, kernels: LayerKernels) -> Loaded:
        """Kernels, compiled and checked."""
        with self._attempts.at(codec.digest(kernels)):
            if self._bench is None:
                self._bench = self._make()
            return self._bench.load(kernels)

    @property
    def default(self) -> Loaded:
        """The default, loaded once."""
        if self._default is None:
            self._default = self.load(self._kernels)
        return self._default

    def pairs(self, loaded: Loaded, count: int) -> Pairs:
        """So many pairs, less those in which something else was at work; who begins alternates."""
        found: Pairs = []
        for number in range(count):
            if number % 2:
                mine, its = loaded.seconds(), self.default.seconds()
            else:
                its, mine = self.default.seconds(), loaded.seconds()
            self._paces.append(its)
            if its <= THROTTLED * statistics.median(self._paces):
                found.append((mine, its))
        return found

    def decide(self, kernels: LayerKernels) -> tuple[Pairs, float]:
        """Fresh pairs until more cannot change what they say, and the largest error met."""
        found: Pairs = []
        error = 0.0
        for _ in range(2 * MOST_PAIRS // RENEWED):
            self._default = None
            loaded = self.load(kernels)
            error = max(error, loaded.error)
            for _ in range(RENEWED // 2):
                found += self.pairs(loaded, 2)
                if found and (len(found) >= MOST_PAIRS or decided(ratios(found))):
                    return found, error
        return found, error
