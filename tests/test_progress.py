"""The progress display: when it shows, its rates and ETA, and that it never ends a run."""

import io

from dovetail.progress import Progress


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_short_run_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        with Progress(2, 20, stream, clock=clock) as progress:
            clock.now += 1.9
            progress.add(2, 20)
        assert stream.getvalue() == ""


def test_plain_lines_at_most_every_interval_with_both_rates() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(10, 1000, stream, interval=10, clock=clock) as progress:
        for second in range(1, 31):
            clock.now += 1
            progress.add(tokens=10 if second <= 10 else 20)
        clock.now += 1
        progress.add(prompts=10)
    assert stream.getvalue().splitlines() == [
        "0/10 prompts, 100 new tokens, 10.0 tok/s (mean 10.0), ETA 1m30s",
        # 20 tokens a second for ten of the last fifteen seconds.
        "0/10 prompts, 300 new tokens, 16.7 tok/s (mean 15.0), ETA 46.7s",
        "0/10 prompts, 500 new tokens, 20.0 tok/s (mean 16.7), ETA 30s",
        "10/10 prompts, 500 new tokens, 18.7 tok/s (mean 16.1), took 31s",
    ]


def test_saved_tokens_shorten_the_eta_and_earlier_prompts_count() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, 100, stream, done_prompts=5, interval=1, clock=clock)
    clock.now += 5
    progress.add(1, 10, saved=70)
    assert stream.getvalue() == "6/10 prompts, 10 new tokens, 2.0 tok/s (mean 2.0), ETA 10s\n"


def test_eta_is_unknown_before_the_first_token() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, 100, stream, interval=1, clock=clock)
    clock.now += 5
    progress.add()
    assert stream.getvalue().endswith("ETA unknown\n")


def test_a_terminal_keeps_one_line() -> None:
    clock, stream = Clock(), Terminal()
    with Progress(10**9, 10**15, stream, clock=clock) as progress:
        for _ in range(3):
            clock.now += 2
            progress.add(1, 10**12)
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\x1b[K\n")
    lines = shown.rstrip("\n").split("\r")[1:]
    assert len(lines) == 4
    assert all(len(line.removesuffix("\x1b[K")) <= 79 for line in lines)


def test_a_stream_that_fails_does_not_end_the_run() -> None:
    closed = io.StringIO()
    clock = Clock()
    progress = Progress(10, 100, closed, interval=1, clock=clock)
    closed.close()
    clock.now += 5
    progress.add(1, 10)
    progress.close()
    with Progress(10, 100, Gone(), interval=1, clock=clock) as progress:
        clock.now += 5
        progress.add(1, 10)
