"""The systemd units: limits, a reload that upgrades, and no hardening that would hide mounts and devices."""

from __future__ import annotations

import configparser
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = ["blkloom.service", "blkloom-user.service"]
HIDING = {
    "BindPaths", "BindReadOnlyPaths", "DeviceAllow", "DevicePolicy", "DynamicUser", "ExecPaths", "InaccessiblePaths",
    "LoadCredential", "MountAPIVFS", "MountFlags", "NoExecPaths", "NoNewPrivileges", "PrivateDevices", "PrivateMounts",
    "PrivateNetwork", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectClock", "ProtectControlGroups", "ProtectHome",
    "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc",
    "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RestrictSUIDSGID", "RootDirectory", "RootImage",
    "SecureBits", "TemporaryFileSystem",
}  # fmt: skip
"""systemd.exec(5): settings with a mount namespace of their own, or without devices or set-uid programs."""
SECCOMP = {"LockPersonality", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "SystemCallFilter",
           "SystemCallArchitectures", "MemoryDenyWriteExecute"}  # fmt: skip
"""Settings that imply NoNewPrivileges for a manager that is not root's."""


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_hides_mounts_devices_or_set_uid_programs(name: str) -> None:
    settings = set(unit(name)["Service"])
    assert not settings & HIDING
    if name == "blkloom-user.service":
        assert not settings & SECCOMP


@pytest.mark.parametrize("name", SERVICES)
def test_a_reload_upgrades_the_supervisor_of_the_unit(name: str) -> None:
    service = unit(name)["Service"]
    command, _, rest = service["ExecStart"].partition(" supervisor")
    assert service["ExecReload"] == f"{command} upgrade"
    assert "--idle-timeout" in rest


@pytest.mark.parametrize("name", SERVICES)
def test_the_socket_stays_when_the_service_ends(name: str) -> None:
    service = unit(name)["Service"]
    socket = unit(name.replace(".service", ".socket"))["Socket"]["ListenStream"]
    assert service["RuntimeDirectory"] == "blkloom"
    assert socket.endswith("/blkloom/control.sock")
    assert service["RuntimeDirectoryPreserve"] == "yes"


@pytest.mark.parametrize("name", SERVICES)
def test_descriptors_and_tasks_are_enough_for_many_devices(name: str) -> None:
    service = unit(name)["Service"]
    assert int(service["LimitNOFILE"]) >= 1 << 19
    assert service["TasksMax"] == "infinity"
    assert service["OOMPolicy"] == "continue"


@pytest.mark.parametrize("name", SERVICES)
def test_a_restart_leaves_the_devices_in_use(name: str) -> None:
    service = unit(name)["Service"]
    assert "--keep-devices" in service["ExecStart"]
    assert int(service["FileDescriptorStoreMax"]) >= 2 * 4096
    assert (service["KillMode"], service["SendSIGKILL"]) == ("process", "no")


@pytest.mark.parametrize("name", ["blkloom-shutdown.service", "blkloom-devices.service"])
def test_mounts_with_netdev_are_between_devices_and_their_removal(name: str) -> None:
    parsed = unit(name)["Unit"]
    assert parsed["Before"] == parsed["Wants"] == "remote-fs-pre.target"
    assert {"blkloom.service", "local-fs.target"} <= set(parsed["After"].split())
    assert "blkloom.service" not in parsed.get("Requires", "")  # its restart would stop this unit


@pytest.mark.parametrize(("kind", "name"), [("system", "blkloom"), ("user", "blkloom-user")])
def test_systemd_takes_them(
    tmp_path: Path, blkloom: str, program: Callable[[str, str], str], kind: str, name: str
) -> None:
    analyze = program("systemd-analyze", "systemd")
    files = []
    for suffix in (".service", ".socket", "-devices.service", "-shutdown.service"):
        text = (UNITS / f"{name}{suffix}").read_text()
        for command in ("/usr/local/bin/blkloom", "%h/.local/bin/blkloom"):
            text = text.replace(command, blkloom)
        text = text.replace("FileDescriptorStorePreserve=yes\n", "")  # since systemd 254
        (tmp_path / f"blkloom{suffix}").write_text(text)
        files.append(str(tmp_path / f"blkloom{suffix}"))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [analyze, f"--{kind}", "verify", "--man=no", *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "blkloom" in line]
    assert (done.returncode, said) == (0, [])
