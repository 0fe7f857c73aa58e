"""Virtual block devices for the tests of programs that use them, and disks that break on purpose; fixtures for pytest.

    pytest_plugins = ["blkloom.testing"]  # in conftest.py

| fixture | what |
|---|---|
| `blkloom_device` | a `Device` on 64 MiB of memory, in this process |
| `blkloom_uri` | the NBD URI at which `blkloom_device` is served, by this process |
| `blkloom_client` | a `Client` of a supervisor of its own, in a temporary run directory |
| `blkloom_power_cut`, `blkloom_flaky_disk`, `blkloom_slow_disk`, `blkloom_full_disk` | functions that make disks |
| `blkloom_seed` | the seed of this test's disks |

Each test has its own. No process is left behind after the test, whether it passes, fails, or is killed: devices in this
process end with it, and the supervisor and its workers end when it has gone (`blkloom.control.own_supervisor`).
The context managers are what the fixtures are made of, for other sizes and scopes.
"""

from blkloom.testing.disks import (
    Disk,
    FlakyDisk,
    FullDisk,
    PowerCutDisk,
    SlowDisk,
    State,
    flaky_disk,
    full_disk,
    power_cut,
    slow_disk,
)
from blkloom.testing.fixtures import (
    blkloom_client,
    blkloom_device,
    blkloom_flaky_disk,
    blkloom_full_disk,
    blkloom_power_cut,
    blkloom_seed,
    blkloom_slow_disk,
    blkloom_uri,
    pytest_addoption,
)
from blkloom.testing.serving import NbdThread, served, supervised

__all__ = [
    "Disk",
    "FlakyDisk",
    "FullDisk",
    "NbdThread",
    "PowerCutDisk",
    "SlowDisk",
    "State",
    "blkloom_client",
    "blkloom_device",
    "blkloom_flaky_disk",
    "blkloom_full_disk",
    "blkloom_power_cut",
    "blkloom_seed",
    "blkloom_slow_disk",
    "blkloom_uri",
    "flaky_disk",
    "full_disk",
    "power_cut",
    "pytest_addoption",
    "served",
    "slow_disk",
    "supervised",
]
