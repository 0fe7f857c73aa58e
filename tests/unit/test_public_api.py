"""The public names of `blkloom`: the same for programs, for type checkers and in the documentation."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blkloom

DOCS = Path(__file__).parents[2] / "docs"

PROGRAM = '''
"""Types are known: a wrong use is an error that is ignored by its code, and an ignore without an error is one."""
import blkloom
from blkloom import Bytes, Extent, LoadContext, LoadedTarget, RetryLater, Sectors, TargetSpec, syntax, to_bytes


class Here(TargetSpec):
    path: str
    depth: int = 1

    name = "here"
    arguments = (syntax.word("path"), syntax.options(syntax.flag("deep")))

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        self.depth = 2  # type: ignore[misc]
        return LoadedHere(self, [(Bytes(0), length, Extent.fault())])


class LoadedHere(LoadedTarget):
    spec: Here
    writes = True

    async def read(self, offset: Bytes, length: Bytes) -> bytes:
        raise RetryLater(5, "not yet", seconds="soon")  # type: ignore[arg-type]

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        deep: str = self.spec.depth  # type: ignore[assignment]


Here("path", deep=True)  # type: ignore[call-arg]


def names(client: blkloom.Client) -> list[str]:
    return [info.name for info in client.info()]


with blkloom.open("0 8 here", targets=[Here]) as device:
    size: str = device.pread(512, 0)  # type: ignore[assignment]
to_bytes(Bytes(1))  # type: ignore[arg-type]
blkloom.no_such_name  # type: ignore[attr-defined]
'''


def names_for_type_checkers() -> set[str]:
    """The names that `if TYPE_CHECKING:` imports."""
    module = ast.parse(Path(blkloom.__file__).read_text())
    (block,) = (
        node
        for node in module.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_programs_and_type_checkers_find_the_same_names() -> None:
    public = set(blkloom.__all__)
    assert len(public) == len(blkloom.__all__)
    assert dir(blkloom) == sorted(public)
    assert set(blkloom._HOME_OF) | {"__version__"} == public
    assert names_for_type_checkers() | {"__version__"} == public


@pytest.mark.parametrize("name", blkloom.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(blkloom, name)
    assert re.search(rf"\| .*`{name}`", (DOCS / "python.md").read_text().partition("## Names")[2])
    if isinstance(value, type) or inspect.isfunction(value):
        assert value.__doc__


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'blkloom' has no attribute 'LoadedTable'"):
        _ = blkloom.LoadedTable  # type: ignore[attr-defined]


def test_listing_the_names_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, blkloom; dir(blkloom); print(*sorted(name for name in sys.modules if name.startswith('blkloom')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert sorted(done.stdout.split()) == ["blkloom", "blkloom.version"]


def run_mypy(tmp_path: Path, code: str, cache: Path) -> tuple[int, list[str]]:
    """Status and messages of `mypy --strict` about a program outside of the source tree, which finds blkloom as any
    installed package.
    """
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache), "--no-error-summary", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=250)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_a_strict_type_checker_knows_every_public_name(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("mypy", reason="mypy is missing (make test-tools)")
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy")  # without one it reads NumPy's types for a minute
    imports = "".join(f"from blkloom import {name}\nreveal_type({name})\n" for name in blkloom.__all__)
    status, said = run_mypy(tmp_path, imports, cache)
    assert status == 0, said
    types = [line for line in said if "Revealed type is" in line]
    assert len(types) == len(blkloom.__all__)
    assert [line for line in types if line.endswith('"Any"')] == []
    assert run_mypy(tmp_path, PROGRAM, cache) == (0, [])


def test_the_documented_tests_of_storage_code_are_typed(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    for module in ("mypy", "apsw"):
        pytest.importorskip(module, reason=f"{module} is missing (make test-tools)")
    assert pytestconfig.cache is not None
    examples = re.findall(r"^```python\n(.*?)^```$", (DOCS / "testing.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        assert run_mypy(tmp_path, example, pytestconfig.cache.mkdir("mypy")) == (0, [])
