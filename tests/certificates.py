"""Certificates and keys for tests of TLS, made by the command `openssl`, in the layout of qemu-nbd and nbdkit."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

import pytest

ALTERNATIVE_NAMES = "DNS:localhost,IP:127.0.0.1,IP:::1"


def openssl(*words: str | Path, directory: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing (Debian package openssl)")
    done = subprocess.run(["openssl", *words], cwd=directory, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


class Authority:
    """An authority and its certificates. Each certificate gets a directory of its own."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self.directory = directory / name
        self.directory.mkdir()
        self._serial = 0
        self._new_key("ca")
        self._self_signed("ca-cert.pem", f"/CN={name}")
        (self.directory / "index").touch()
        (self.directory / "ca.conf").write_text(
            "[ca]\ndefault_ca=own\n[own]\ndatabase=index\ndefault_md=sha256\ndefault_crl_days=2\n"
            "certificate=ca-cert.pem\nprivate_key=ca-key.pem\n"
        )

    def _new_key(self, name: str) -> None:
        curve = ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
        openssl(*curve, "-out", f"{name}-key.pem", directory=self.directory)

    def _self_signed(self, name: str, subject: str) -> None:
        openssl(
            "req", "-x509", "-key", "ca-key.pem", "-out", name, "-days", "2", "-subj", subject, directory=self.directory
        )

    def issue(self, name: str, subject: str, *, days: int = 2, role: str = "server") -> Path:
        """A directory with `ca-cert.pem` and the certificate and key of a server, or of a client. days: below 0: it has
        expired.
        """
        self._serial += 1
        self._new_key(name)
        openssl(
            "req", "-new", "-key", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", subject, directory=self.directory
        )
        (self.directory / f"{name}.ext").write_text(
            f"subjectAltName={ALTERNATIVE_NAMES}\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n"
            f"extendedKeyUsage={role}Auth\n"
        )
        signed = [
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca-cert.pem",
            "-CAkey",
            "ca-key.pem",
            "-days",
            str(days),
        ]
        more = ["-set_serial", str(self._serial), "-extfile", f"{name}.ext", "-out", f"{name}-cert.pem"]
        openssl(*signed, *more, directory=self.directory)
        made = self.directory / name
        made.mkdir()
        shutil.copy(self.directory / "ca-cert.pem", made)
        for kind in ("cert", "key"):
            shutil.copy(self.directory / f"{name}-{kind}.pem", made / f"{role}-{kind}.pem")
        return made

    def revoke(self, name: str) -> Path:
        """Revokes a certificate. The list of revoked certificates."""
        settings = ["ca", "-config", "ca.conf"]
        openssl(*settings, "-revoke", f"{name}-cert.pem", directory=self.directory)
        return self.revoked()

    def revoked(self) -> Path:
        """The list of revoked certificates."""
        openssl("ca", "-config", "ca.conf", "-gencrl", "-out", "ca-crl.pem", directory=self.directory)
        return self.directory / "ca-crl.pem"


def pre_shared_keys(path: Path, *users: str) -> Path:
    """A file of new keys."""
    path.write_text("".join(f"{user}:{secrets.token_hex(32)}\n" for user in users))
    return path
