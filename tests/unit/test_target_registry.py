"""The registry of targets: names, plug-ins by entry point, and errors that list the targets."""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

from blkloom.errors import Place, UnknownTarget, UsageError
from blkloom.targets.registry import BUILTIN, ENTRY_POINT_GROUP, Targets, all_targets, builtin_targets
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero


class Mine(TargetSpec):
    """A target of a caller's."""

    name: ClassVar[str] = "mine"


class MyZero(Mine):
    """In place of the built-in one."""

    name = "zero"


class Nameless(Mine):
    """Cannot be in a table."""

    name = "two words"


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


def test_every_built_in_target_is_found_by_its_name() -> None:
    assert [cls.name for cls in builtin_targets()] == sorted(BUILTIN)


def test_an_unknown_name_lists_the_targets_and_the_nearest() -> None:
    with pytest.raises(UnknownTarget) as caught:
        builtin_targets().find("liner", place=Place("T", 2, 8))
    assert caught.value.place == Place("T", 2, 8)
    assert caught.value.value == "liner"
    assert f"did you mean 'linear'? there are: {', '.join(builtin_targets().names())}" in str(caught.value)


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(UnknownTarget, match=r"\(there are: delay"):
        builtin_targets().find("qqqqq")


def test_a_caller_s_class_goes_before_the_built_in_one() -> None:
    targets = all_targets([Mine, MyZero])
    assert targets.find("mine") is Mine
    assert targets.find("zero") is MyZero
    assert builtin_targets().find("zero") is Zero
    assert "mine" in targets
    assert "mine" not in builtin_targets()


def test_extending_leaves_the_original_alone() -> None:
    targets = builtin_targets()
    assert targets.extended([Mine]).find("mine") is Mine
    assert "mine" not in targets


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two target classes are named 'zero'"):
        Targets([Zero, MyZero])


def test_a_class_without_a_fit_name_is_refused() -> None:
    with pytest.raises(UsageError, match="has no name"):
        Targets([Nameless])


def test_an_installed_package_s_target_is_found_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "shiny-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[blkloom.targets]\nshiny = shiny_target:Shiny\nzero = shiny_target:Shiny\n")
    (tmp_path / "shiny_target.py").write_text(
        "from blkloom.targets.zero import Zero\nclass Shiny(Zero):\n    name = 'shiny'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert all_targets().find("shiny").__name__ == "Shiny"
    assert all_targets().find("zero") is Zero, "a plug-in must not replace a built-in target"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module:X", "cannot be imported"),
        ("json:dumps", "not a TargetSpec"),
        (f"{__name__}:Mine", "named 'broken'"),
    ],
)
def test_a_plug_in_that_cannot_be_used_harms_only_its_own_name(
    value: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    targets = Targets([Mine], installed=[point("broken", value)])
    with pytest.raises(UnknownTarget, match=why):
        targets.find("broken")
    assert list(targets) == [Mine]
    assert why in caplog.text
