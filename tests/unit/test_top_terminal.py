"""The terminal of a full-screen command: keys without Return, and restoration at the end."""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Iterator

import pytest

from blkloom.cli.terminal import HUNG_UP, RESIZED, SUSPENDED, Terminal, keys_of

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP)


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    """A terminal: who types, and what is read from."""
    typist, keys = os.openpty()
    yield typist, keys
    os.close(keys)
    os.close(typist)


def state(keys: int) -> tuple[object, ...]:
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return termios.tcgetattr(keys), [signal.getsignal(number) for number in SIGNALS], wakeup


def test_keys_come_without_return_and_without_echo(pair: tuple[int, int]) -> None:
    typist, keys = pair
    with Terminal(keys) as terminal:
        local = termios.tcgetattr(keys)[3]
        assert not local & (termios.ICANON | termios.ECHO)
        os.write(typist, b"i\x1b[A q")
        assert terminal.wait(30) == ["i", "up", " ", "q"]
        assert terminal.wait(0) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_the_terminal_is_as_before_whatever_ended_the_block(pair: tuple[int, int], error: type[BaseException]) -> None:
    before = state(pair[1])

    def use() -> None:
        with Terminal(pair[1]):
            assert state(pair[1]) != before
            raise error

    with pytest.raises(error):
        use()
    assert state(pair[1]) == before


def test_a_terminal_that_cannot_be_set_up_leaves_nothing_behind(pair: tuple[int, int]) -> None:
    before = state(pair[1])
    read, write = os.pipe()
    try:
        with pytest.raises(termios.error), Terminal(read):
            pytest.fail("a pipe is no terminal")
        assert state(pair[1]) == before
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(("number", "event"), [(signal.SIGWINCH, RESIZED), (signal.SIGTSTP, SUSPENDED)])
def test_a_signal_wakes_the_one_who_waits(pair: tuple[int, int], number: signal.Signals, event: str) -> None:
    with Terminal(pair[1]) as terminal:
        os.kill(os.getpid(), number)
        assert terminal.wait(30) == [event]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_goes_through_every_finally(pair: tuple[int, int], number: signal.Signals) -> None:
    before = state(pair[1])
    with pytest.raises(SystemExit) as ended, Terminal(pair[1]):
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert state(pair[1]) == before


def test_a_terminal_that_hangs_up_says_so() -> None:
    typist, keys = os.openpty()
    try:
        with Terminal(keys) as terminal:
            os.close(typist)
            assert terminal.wait(30) == [HUNG_UP]
    finally:
        os.close(keys)


def test_without_keys_it_waits_for_signals_only() -> None:
    with Terminal(None) as terminal:
        os.kill(os.getpid(), signal.SIGWINCH)
        assert terminal.wait(30) == [RESIZED]
        assert terminal.wait(0) == []


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"abc", ["a", "b", "c"]),
        (b"\x1b", ["\x1b"]),
        (b"\x1b[B\x1bOB\x1b[5~\x1b[6~", ["down", "down", "pageup", "pagedown"]),
        (b"\x1b[H\x1b[F\x1b[1~\x1b[4~", ["home", "end", "home", "end"]),
        (b"\x1b[15~x", ["x"]),
        (b"\xc3\xa9", ["Ã", "©"]),
        (b"", []),
    ],
)
def test_what_keys_send_becomes_their_names(data: bytes, keys: list[str]) -> None:
    assert keys_of(data) == keys
