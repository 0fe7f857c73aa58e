"""Certificates for tests of TLS: an authority, a server and a client that it has issued."""

from __future__ import annotations

from pathlib import Path

import pytest

from certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def server_files(authority: Authority) -> Path:
    return authority.issue("server", "/O=Example/CN=localhost")


@pytest.fixture(scope="module")
def client_files(authority: Authority) -> Path:
    return authority.issue("laptop", "/O=Example/CN=laptop", role="client")
