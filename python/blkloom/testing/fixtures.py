"""Fixtures and options for pytest. `blkloom.testing` is the plugin that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Final, ParamSpec, TypeVar

import pytest

from blkloom import Bytes, Client, Device, to_sectors
from blkloom import open as open_device
from blkloom.testing.disks import (
    FlakyDisk,
    FullDisk,
    PowerCutDisk,
    SlowDisk,
    flaky_disk,
    full_disk,
    power_cut,
    slow_disk,
)
from blkloom.testing.seeds import choose_seed, parse_seed
from blkloom.testing.serving import served, supervised

_P = ParamSpec("_P")
_T = TypeVar("_T")

DEVICE_SIZE: Final = Bytes(64 << 20)
"""Bytes of `blkloom_device`; pages that were never written take no memory."""
_OPTION: Final = "--blkloom-seed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option for the seed."""
    parser.getgroup("blkloom").addoption(
        _OPTION, metavar="NUMBER", help="seed of random failures and power cuts, as a failed test has printed it"
    )


@pytest.fixture
def blkloom_device() -> Iterator[Device]:
    """A device on 64 MiB of memory; its bytes are zeros."""
    with open_device(f"0 {to_sectors(DEVICE_SIZE)} ram") as device:
        yield device


@pytest.fixture
def blkloom_uri(blkloom_device: Device) -> Iterator[str]:
    """The NBD URI of `blkloom_device`, served while the test runs."""
    with served(blkloom_device) as uri:
        yield uri


@pytest.fixture
def blkloom_client() -> Iterator[Client]:
    """A client of a supervisor of its own (`supervised`)."""
    with supervised() as client:
        yield client


@pytest.fixture
def blkloom_seed(request: pytest.FixtureRequest) -> int:
    """The seed of the disks of this test, and for its own random choices: that of the option `--blkloom-seed`, that of
    the environment variable BLKLOOM_SEED, or another one each time. It is printed if the test fails.
    """
    text = request.config.getoption(_OPTION)
    seed = choose_seed() if text is None else parse_seed(text, _OPTION)
    request.node.add_report_section("setup", "blkloom_seed", f"seed {seed}; to repeat: {_OPTION} {seed}")
    return seed


@pytest.fixture
def blkloom_power_cut(request: pytest.FixtureRequest, blkloom_seed: int) -> Iterator[Callable[..., PowerCutDisk]]:
    """A function that makes disks as `power_cut` does; they are there until the test ends."""
    with _factory(request) as stack:
        yield _seeded(stack, blkloom_seed, power_cut)


@pytest.fixture
def blkloom_flaky_disk(request: pytest.FixtureRequest, blkloom_seed: int) -> Iterator[Callable[..., FlakyDisk]]:
    """A function that makes disks as `flaky_disk` does; they are there until the test ends."""
    with _factory(request) as stack:
        yield _seeded(stack, blkloom_seed, flaky_disk)


@pytest.fixture
def blkloom_slow_disk(request: pytest.FixtureRequest) -> Iterator[Callable[..., SlowDisk]]:
    """A function that makes disks as `slow_disk` does; they are there until the test ends."""
    with _factory(request) as stack:
        yield _entered(stack, slow_disk)


@pytest.fixture
def blkloom_full_disk(request: pytest.FixtureRequest) -> Iterator[Callable[..., FullDisk]]:
    """A function that makes disks as `full_disk` does; they are there until the test ends."""
    with _factory(request) as stack:
        yield _entered(stack, full_disk)


def _factory(request: pytest.FixtureRequest) -> ExitStack:
    """A stack for the disks of a test. They go before the supervisor that may have them, whatever comes first in the
    arguments of the test.
    """
    if "blkloom_client" in request.fixturenames:
        request.getfixturevalue("blkloom_client")
    return ExitStack()


def _entered(stack: ExitStack, manager: Callable[_P, AbstractContextManager[_T]]) -> Callable[_P, _T]:
    def make(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return stack.enter_context(manager(*args, **kwargs))

    return make


def _seeded(stack: ExitStack, seed: int, manager: Callable[_P, AbstractContextManager[_T]]) -> Callable[_P, _T]:
    def make(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if kwargs.get("seed") is None:
            kwargs["seed"] = seed
        return stack.enter_context(manager(*args, **kwargs))

    return make
