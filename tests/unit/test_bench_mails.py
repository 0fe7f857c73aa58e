"""The results of the mails' test scripts: read from a script's files, merged, compared with goals, and reported."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs import JobError
from mail_results import Place, Row, added, comparisons, load, save, section
from mail_scripts import GUEST, HOST, _read

SCRIPTS = Path(__file__).parents[2] / "bench" / "mails"


def fio_json(ios: int, milliseconds: int, error: int = 0) -> str:
    side = {"total_ios": ios, "runtime": milliseconds, "clat_ns": {}}
    none = {"total_ios": 0, "runtime": 0, "clat_ns": {}}
    return json.dumps({"jobs": [{"read": side, "write": none, "error": error, "usr_cpu": 1.0, "sys_cpu": 1.0}]})


def stored(results: Path, number: int, name: str, *, ios: int, milliseconds: int, error: int = 0) -> None:
    (results / f"{number}.name").write_text(name + "\n")
    (results / f"{number}.json").write_text(fio_json(ios, milliseconds, error))
    (results / f"{number}.before").write_text("ctxt 100\nBuffers: 0 kB\nCached: 0 kB\n")
    (results / f"{number}.after").write_text("ctxt 600\nBuffers: 1024 kB\nCached: 2048 kB\n")


def test_a_row_counts_all_ios_over_the_time_from_the_first_job_to_the_last(tmp_path: Path) -> None:
    stored(tmp_path, 0, "4K randrw, 2 jobs: blkloom", ios=1000, milliseconds=500)
    (tmp_path / "0_clat.1.log").write_text("1000, 5, 0, 4096, 0\n")
    (tmp_path / "0_clat.2.log").write_text("1500, 5, 0, 4096, 0\n")
    assert _read("goals", tmp_path) == [Row("goals", "4K randrw, 2 jobs", "blkloom", [1000.0], [0.5], [3.0])]


def test_a_test_with_errors_has_no_results(tmp_path: Path) -> None:
    stored(tmp_path, 0, "4K randrw: blkloom", ios=1000, milliseconds=500, error=5)
    with pytest.raises(JobError, match="4K randrw: blkloom"):
        _read("goals", tmp_path)


def place(name: str, *rows: Row, counts: bool = False, via: str = "ublk") -> Place:
    scripts = {row.script: {"SIZE": "1"} for row in rows}
    return Place(name, "7.3", via, counts, "2026-01-01", "abc", 1, scripts, list(rows))


def goal(contender: str, rate: float) -> Row:
    return Row("goals", "4K randrw", contender, [rate])


def test_a_ratio_of_rates_is_to_be_high_and_one_of_instructions_low() -> None:
    here = place("host", goal("losetup", 100.0), goal("blkloom", 36.0), goal("zero", 40.0), via="loop")
    (rate,) = comparisons(here)
    assert (rate.ratio, rate.floor, rate.verdict) == (0.36, 0.4, "met")

    machine = place("vm", goal("losetup", 100.0), goal("blkloom", 50.0), goal("zero", 52.0), counts=True)
    (instructions,) = comparisons(machine)
    assert instructions.ratio == 2.0
    assert instructions.verdict == "at the floor"

    slow = place("vm", goal("losetup", 100.0), goal("blkloom", 50.0), goal("zero", 70.0), counts=True)
    assert [one.verdict for one in comparisons(slow)] == ["**missed**"]


def test_a_later_run_replaces_the_scripts_that_it_ran(tmp_path: Path) -> None:
    first = place("vm", goal("losetup", 1.0), Row("2018", "4K", "losetup", [2.0]))
    again = place("vm", goal("losetup", 3.0))
    save(added(added([], first), again), tmp_path / "mails.json")
    (merged,) = load(tmp_path / "mails.json")
    assert {(row.script, row.rate) for row in merged.rows} == {("goals", 3.0), ("2018", 2.0)}
    assert merged.settings.keys() == {"goals", "2018"}
    assert load(tmp_path / "none.json") == []


def test_the_report_has_the_ratios_to_peers() -> None:
    text = section([place("vm", goal("losetup", 100.0), goal("blkloom", 80.0), counts=True)])
    assert "| goals | 4K randrw | blkloom | 12,500,000 | 1.25x | - | - | - |" in text


@pytest.mark.parametrize("script", sorted(HOST.keys() | GUEST.keys()))
def test_every_script_is_there_and_says_what_it_needs(script: str) -> None:
    path = SCRIPTS / f"{script}.sh"
    assert subprocess.run([shutil.which("bash") or "bash", "-n", path], check=False).returncode == 0
    text = path.read_text()
    for name in {*HOST[script], *GUEST[script]}:
        assert f"{name}=" in text or f"{{{name}:-" in text, f"{name} is no setting of {path.name}"
