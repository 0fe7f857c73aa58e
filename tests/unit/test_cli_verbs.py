"""dmsetup's verbs: their requests to the supervisor and their output, without a supervisor."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blkloom.cli import connecting, main
from blkloom.cli.verbs import SECTIONS, VERBS
from blkloom.control.messages import DeviceKey, Selector
from blkloom.control.states import DeviceInfo, ExportState
from blkloom.dm.options import IGNORED, LONG
from blkloom.errors import BackingError, Place, TableError, UsageError
from blkloom.table import parse_table
from blkloom.targets.registry import builtin_targets

DISK = DeviceInfo(
    name="my disk",
    minor=2,
    uuid="some-uuid",
    live=True,
    targets=2,
    types=["linear", "zero"],
    size=8192,
    deps=["/x/disk.img"],
    exports=[ExportState(id="0", name="my disk", unix="/run/dev/disk", automatic=True)],
)
FAILED = DeviceInfo(name="broken", minor=0, state="FAILED", reason="/x/gone.img: I/O error", live=True, inactive=True)
BY_UUID, BY_NUMBER = Selector(uuid="some-uuid"), Selector(minor=2)
READ_ONLY = {"source": "--table", "read_only": True}
TABLE = "0 8 linear /x/disk.img 0\n8 8 zero"


class Recorder:
    """A client that knows two devices and remembers what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.raises: Exception | None = None

    def info(self, device: DeviceKey = "") -> list[DeviceInfo]:
        found = {"my disk": DISK, BY_UUID: DISK, BY_NUMBER: DISK, "broken": FAILED}
        if device and device not in found:
            raise UsageError(f"no device {device}", errno=errno.ENXIO)
        return [found[device]] if device else [FAILED, DISK]

    def table(self, device: str, *, inactive: bool = False) -> str:
        return "" if inactive or device == "broken" else TABLE

    def status(self, device: str) -> list[tuple[int, int, str, str]]:
        return [(0, 8, "linear", ""), (8, 8, "zero", "")] if device == "my disk" else []

    def __getattr__(self, verb: str) -> Any:
        def ask(*arguments: Any, **options: Any) -> Any:
            self.calls.append((verb, *arguments, {name: value for name, value in options.items() if value}))
            if self.raises:
                raise self.raises
            return {"wait": 5, "message": "an answer", "remove_all": [("my disk", "a client")]}.get(verb, DISK)

        return ask


class Told:
    """What a command line ended with."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


class Run:
    def __init__(self, client: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
        self.client = client
        self._capsys = capsys

    def __call__(self, *words: str) -> Told:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["blkloom", *words])
            with pytest.raises(SystemExit) as ended:
                main.main()
        told = self._capsys.readouterr()
        return Told(int(ended.value.code or 0), told.out, told.err)

    def asks(self, *words: str) -> list[tuple[Any, ...]]:
        """The calls of a command that succeeds and says nothing."""
        told = self(*words)
        assert (told.status, told.out, told.err) == (0, "", "")
        return self.client.calls


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    client = Recorder()
    monkeypatch.setenv("BLKLOOM_RUN_DIR", str(tmp_path))

    @contextmanager
    def connect(run_dir: str | None, *, start: bool = True) -> Iterator[Recorder]:
        yield client

    monkeypatch.setattr(connecting, "connect", connect)
    monkeypatch.setattr(connecting, "look", connect)
    monkeypatch.setattr(main, "_any_bytes", lambda stream: None)
    return Run(client, capsys)


# What is asked


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["create", "a", "--table", "0 8 zero"], {"table": "0 8 zero"}),
        (["-r", "create", "a", "-u", "id", "--tab=0 8 zero"], {"read_only": True, "uuid": "id", "table": "0 8 zero"}),
        (["create", "a", "-n"], {}),
        (["create", "-j0", "-m7", "a", "--notable"], {"minor": 7}),
        (["create", "a", "--notable", "--noudevsync", "--readahead", "auto", "--yes"], {}),
        (["create", "a", "--shared", "--notable"], {"shared": True}),
        (["create", "a", "--table", "# nothing\n"], {}),
    ],
)
def test_create_takes_a_table_and_dmsetups_options(run: Run, words: list[str], options: dict[str, Any]) -> None:
    ((verb, name, asked),) = run.asks(*words)
    asked.pop("source")
    assert (verb, name, asked) == ("create", "a", options)


def test_create_reads_tables_from_files_and_from_standard_input(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "disk.table"
    file.write_text("0 8 zero\n")
    assert run.asks("create", "a", str(file)) == [("create", "a", {"table": "0 8 zero\n", "source": str(file)})]
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run.asks("create", "b")[1] == ("create", "b", {"table": "0 8 zero\n", "source": "standard input"})


def test_create_makes_each_device_of_a_concise_form(run: Run) -> None:
    assert run.asks("create", "--concise", r"a,,,,0 8 zero,8 8 linear /x\,y 0;b,id,9,ro,0 8 error") == [
        ("create", "a", {"table": "0 8 zero\n8 8 linear /x,y 0", "source": "--concise a"}),
        ("create", "b", {"table": "0 8 error", "source": "--concise b", "uuid": "id", "minor": 9, "read_only": True}),
    ]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("load my\\x20disk --table 0_8_zero", ("load", "my disk", "0 8 zero", {"source": "--table"})),
        ("reload -r -u some-uuid --table 0_8_zero", ("load", BY_UUID, "0 8 zero", READ_ONLY)),
        ("clear a", ("clear", "a", {})),
        ("suspend --noflush --nolockfs a", ("suspend", "a", {})),
        ("suspend a --timeout 3", ("suspend", "a", {"flush": True, "lock_fs": True, "timeout": 3.0})),
        ("resume -j 0 -m 2", ("resume", BY_NUMBER, {"flush": True})),
        ("remove -j 0 -m -1", ("remove", Selector(minor=-1), {})),
        ("remove -j 0 -m 18446744073709551616", ("remove", Selector(minor=1 << 64), {})),
        ("remove -j 0 -m 2nd", ("remove", BY_NUMBER, {})),
        ("remove -j 0 -m second", ("remove", Selector(minor=0), {})),
        ("remove --force --retry a", ("remove", "a", {"force": True, "retry": True})),
        ("--deferred remove a", ("remove", "a", {"deferred": True})),
        ("rename a b", ("rename", "a", {"name": "b"})),
        ("rename --setuuid a b", ("rename", "a", {"uuid": "b"})),
        ("rename -u id b", ("rename", Selector(uuid="id"), {"name": "b"})),
        ("remove -S name=broken", ("remove", "broken", {})),
        ("wait broken 0", ("wait", "broken", 0, {})),
        ("wait broken", ("wait", "broken", 0, {})),
        ("unexport a 1", ("unexport", "a", "1", {})),
        ("unexport a /x/s", ("unexport", "a", "/x/s", {})),
        ("suspend uuid:some-uuid", ("suspend", "uuid:some-uuid", {"flush": True, "lock_fs": True})),
        ("remove minor:2", ("remove", "minor:2", {})),
        ("remove -S name=broken -j 0 -m 2", None),
        ("stop", ("stop", {})),
        ("stop -f", ("stop", {"force": True})),
        ("stop --force", ("stop", {"force": True})),
    ],
)  # fmt: skip
def test_a_verb_asks_this(run: Run, words: str, asked: tuple[Any, ...] | None) -> None:
    asks = run.asks(*[word.replace("_", " ") if word == "0_8_zero" else word for word in words.split()])
    assert asks == ([] if asked is None else [asked])


def test_verbs_go_through_their_devices_in_order(run: Run) -> None:
    assert [call[1] for call in run.asks("remove", "a", "b", "/dev/mapper/c\\x20d")] == ["a", "b", "c d"]


def test_wait_returns_at_once_when_the_event_is_another(run: Run) -> None:
    assert run.asks("wait", "broken", "7") == []


def test_wipe_table_loads_an_error_table_of_the_devices_size(run: Run) -> None:
    assert run.asks("wipe_table", "-f", "my disk") == [
        ("load", "my disk", "0 16 error", {"source": "wipe_table"}),
        ("resume", "my disk", {}),
    ]


def test_a_message_is_its_words_and_its_answer_is_printed(run: Run) -> None:
    told = run("message", "my disk", "8", "two", "words")
    assert (told.status, told.out) == (0, "an answer\n")
    assert run.client.calls == [("message", "my disk", 8, "two words", {})]


# What is refused, before anything is asked


@pytest.mark.parametrize("verb", ["stop", "remove_all", "reap", "upgrade", "version", "targets", "udevcookies", "help"])
@pytest.mark.parametrize("option", ["-u some-uuid", "-j 0 -m 2", "-S name=broken"])
def test_a_verb_for_all_takes_no_selector(run: Run, verb: str, option: str) -> None:
    for words in (f"{verb} {option}", f"{option} {verb}"):
        told = run(*words.split())
        assert (told.status, told.out, run.client.calls) == (1, "", [])
        assert f"{verb} does not take --" in told.err


@pytest.mark.parametrize("words", ["create a -n", "load a", "rename a b", "message a 0 x", "wait a", "export a"])
def test_a_verb_for_one_device_takes_no_selection(run: Run, words: str) -> None:
    told = run(*words.split(), "-S", "name=broken")
    assert (told.status, told.out, run.client.calls) == (1, "", [])
    assert f"{words.split(maxsplit=1)[0]} does not take --select" in told.err


@pytest.mark.parametrize(
    "words", ["remove a", "info a", "clear a", "rename a b", "message a 0 x", "export a", "mknodes a"]
)
@pytest.mark.parametrize("option", ["-u some-uuid", "-j 0 -m 2"])
def test_a_device_is_named_in_one_way(run: Run, words: str, option: str) -> None:
    told = run(*words.split(), *option.split())
    assert (told.status, told.out, run.client.calls) == (1, "", [])
    assert "names a device, and so do -u, or -j and -m" in told.err or "Invalid sector" in told.err


def test_a_uuid_and_a_number_are_two_ways(run: Run) -> None:
    told = run("remove", "-u", "some-uuid", "-j", "0", "-m", "2")
    assert (told.status, run.client.calls) == (1, [])
    assert "-u names a device, and so do -j and -m" in told.err


_DOCUMENT = Path(__file__).parents[2] / "docs" / "dmsetup.md"
_UNSAID = {
    ("info", "inactive"),
    ("deps", "inactive"),
    ("info", "unbuffered"),
    ("load", "notable"),
    ("reload", "notable"),
}
"""Options of a verb that are dmsetup's, too, and do nothing in either, or say so."""


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.dmsetup])
def test_an_option_is_in_the_help_or_documented_as_ignored_or_refused(run: Run, verb: str) -> None:
    shown = set(re.findall(r"--([a-z-]+)", run(verb, "--help").out)) | {"verbose", "manglename", "select"}
    ignored = set(
        re.findall(r"`--([a-z]+)`", re.split(r"accepted and ignored", _DOCUMENT.read_text())[1].split("There are")[0])
    )
    assert ignored == IGNORED
    for option, takes_value in LONG.items():
        if option in shown | ignored or (verb, option) in _UNSAID or option == "help":
            continue
        told = (
            run(verb, "--major=0", f"--{option}=1")
            if option == "minor"
            else run(verb, f"--{option}{'=1' * takes_value}")
        )
        assert told.status == 1, option
        assert "does not take" in told.err or option == "major", option
        assert run.client.calls == []


# What is said


def test_info_of_a_failed_device_has_its_reason(run: Run) -> None:
    assert run("info", "broken").out.splitlines() == [
        "Name:              broken",
        "State:             FAILED",
        "Reason:            /x/gone.img: I/O error",
        "Tables present:    LIVE & INACTIVE",
        "Open count:        0",
        "Event number:      0",
        "Major, minor:      0, 0",
        "Number of targets: 0",
        "",
    ]


def test_info_as_json_has_all_there_is(run: Run) -> None:
    (disk,) = json.loads(run("info", "--json", "my disk").out)
    assert disk["exports"][0]["unix"] == "/run/dev/disk"
    assert len(json.loads(run("info", "--json").out)) == 2


def test_info_columns_have_blkloms_own_fields(run: Run) -> None:
    told = run("info", "-c", "--noheadings", "-o", "name,size,sectors,socket,state,targets", "my disk")
    assert told.out == "my disk:8192:16:/run/dev/disk:ACTIVE:linear,zero\n"


@pytest.mark.parametrize("field", ["help", "?"])
def test_info_lists_its_fields(run: Run, field: str) -> None:
    told = run("info", "-c", "-o", field)
    assert (told.status, told.err) == (0, "")
    assert "tables_loaded" in told.out


def test_tables_and_status_are_prefixed_where_there_are_several(run: Run) -> None:
    assert run("table", "my disk").out == "0 8 linear /x/disk.img 0\n8 8 zero \n"
    assert run("table").out == "broken: \nmy disk: 0 8 linear /x/disk.img 0\nmy disk: 8 8 zero \n"
    assert run("status", "--target", "zero").out == "my disk: 8 8 zero \n"
    assert run("table", "-S", "live=1").status == 1
    assert run("table", "-S", "minor=2", "--target=zero").out == "my disk: 8 8 zero \n"
    assert run("table", "--inactive", "my disk").out == "\n"


def test_the_concise_form_can_be_created_again(run: Run) -> None:
    concise = run("table", "--concise", "my disk").out
    assert concise == "my disk,some-uuid,2,rw,0 8 linear /x/disk.img 0,8 8 zero \n"
    told = run("create", "--concise", concise)
    assert told.status == 0
    ((_, name, options),) = run.client.calls
    assert (name, options["uuid"], options["minor"]) == ("my disk", "some-uuid", 2)
    assert options["table"] == "0 8 linear /x/disk.img 0\n8 8 zero "


def test_names_are_shown_as_the_mangling_mode_has_them(run: Run) -> None:
    assert run("ls").out == "broken\t(0:0)\nmy disk\t(0:2)\n"
    assert run("--manglename", "none", "ls").out == "broken\t(0:0)\nmy\\x20disk\t(0:2)\n"
    assert run("ls", "-o", "devname", "--target", "zero").out == "my disk\t(0, 2)\n"


def test_verbose_tells_the_state_after_it_was_changed(run: Run) -> None:
    assert run("-v", "suspend", "my disk").out.startswith("Name:              my disk\n")


def test_remove_all_tells_what_stays(run: Run) -> None:
    told = run("remove_all", "--force")
    assert told.status == 0
    assert told.err.splitlines() == ["Unable to remove 1 device(s).", "blkloom: my disk stays: a client"]


def test_exec_runs_a_command_with_each_socket(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    told = run("--run-dir", str(tmp_path), "ls", "--target", "zero", "--exec", "cp /dev/null")
    assert (told.status, told.out, told.err) == (0, "", "")
    assert [path.name for path in (tmp_path / "dev").iterdir()] == ["my\\x20disk"]


# What fails


@pytest.mark.parametrize(
    ("error", "line", "more"),
    [
        (UsageError("a client is connected", errno=errno.EBUSY), "Device or resource busy", "a client is connected"),
        (UsageError("no device a", errno=errno.ENXIO), "No such device or address", "no device a"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", "Input/output error (EIO)"),
    ],
)
def test_an_error_is_told_as_dmsetup_tells_it_and_then_in_full(
    run: Run, error: Exception, line: str, more: str
) -> None:
    run.client.raises = error
    told = run("remove", "my disk")
    assert told.status == 1
    assert told.err.splitlines() == [
        f"device-mapper: remove ioctl on my\\x20disk  failed: {line}",
        "Command failed.",
        f"blkloom: {more}",
    ]


@pytest.mark.parametrize("words", [["unexport", "a", "1"], ["stop"], ["upgrade"]])
def test_an_error_dmsetup_has_no_words_for_is_told_in_ours(run: Run, words: list[str]) -> None:
    run.client.raises = UsageError("it cannot be", cure="do this", errno=errno.EINVAL)
    told = run(*words)
    assert (told.status, told.out, told.err) == (1, "", "blkloom: it cannot be; do this\n")


def test_a_bad_table_is_a_failed_reload_with_its_place(run: Run) -> None:
    run.client.raises = TableError(
        "unknown target", place=Place("--table", 1, 5), value="nonsense", cure="targets are: x"
    )
    told = run("create", "a", "-u", "id", "--table", "0 8 nonsense")
    assert told.err.splitlines() == [
        "device-mapper: reload ioctl on a  failed: Invalid argument",
        "Command failed.",
        "blkloom: --table:1:5: unknown target: 'nonsense' (targets are: x)",
    ]
    run.client.raises = BackingError("cannot be opened", path="/x", errno=errno.ENOENT)
    told = run("load", "my disk", "--table", "0 8 linear /x 0")
    assert told.err.splitlines()[0] == "device-mapper: reload ioctl on my\\x20disk  failed: No such file or directory"


def test_a_device_that_is_there_is_a_failed_create_with_its_uuid(run: Run) -> None:
    run.client.raises = UsageError("there is one", errno=errno.EBUSY)
    told = run("create", "a", "-u", "id", "--notable")
    assert told.err.splitlines()[0] == "device-mapper: create ioctl on a id failed: Device or resource busy"


def test_a_file_that_is_no_text_is_refused_with_the_option_that_makes_a_device_of_it(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "a disk.img"
    disk.write_bytes(bytes(1000))
    told = run("create", "a", str(disk))
    assert told.err.splitlines()[0] == f"{disk} is no table."
    (option,) = re.findall(r"add (--format raw)", told.err)
    ((_verb, _name, options),) = [
        call for call in run.asks("create", "a", str(disk), *option.split()) if "table" in call[-1]
    ]
    segments = parse_table(options["table"], targets=builtin_targets()).segments
    assert [(segment.length, segment.target.format()[0]) for segment in segments] == [(2, str(disk))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("info none", "Device does not exist.\nCommand failed."),
        ("status none", "Device does not exist.\nCommand failed."),
        ("table none", "device-mapper: table ioctl on none  failed: No such device or address\nCommand failed."),
        ("deps -u none", "device-mapper: deps ioctl on  none failed: No such device or address\nCommand failed."),
        ("info -j 253 -m 9", "Device does not exist.\nCommand failed."),
        ("wait", "No device specified.\nCommand failed."),
        ("remove", "No device specified.\nCommand failed."),
        ("load", "Please specify device.\nCommand failed."),
        ("load a --notable", "--notable only available when creating new device.\nCommand failed."),
        ("create", "Please provide a name for the new device.\nCommand failed."),
        ("create a --table 0", "Invalid format on line 1 of table .\nCommand failed."),
        ("create a /no/such/file", "Couldn't open '/no/such/file' for reading.\nCommand failed."),
        ("create a/b --notable", 'Name "a/b" invalid. It contains "/".\nCommand failed.'),
        ("create .. --notable", "device-mapper: create ioctl on ..  failed: Invalid argument\nCommand failed."),
        ("create --concise x,,,", "Incomplete entry: five comma-separated fields are required for each device"),
        ("create --concise x,,,bad,t", "Invalid flags parameter 'bad' must be 'ro' or 'rw' or empty."),
        ("create --concise -u y x", "--concise is incompatible with --[no]table, --minor, --uuid and --inactive."),
        ("message a x hello", "Invalid sector.\nCommand failed."),
        ("rename a", "No device specified.\nCommand failed."),
        ("/x/y ls", "Unknown command."),
        ("sreve", "Usage: blkloom [OPTIONS] VERB [ARGUMENTS]...\nblkloom: 'sreve' is no verb; serve?"),
        ("table /x/y", "Device /x/y not found\nCommand failed."),
        ("ls one", "Incorrect number of arguments.\nUsage: blkloom ls"),
        ("rename a b c", "Incorrect number of arguments.\nUsage: blkloom rename"),
        ("ls --nonsense", "blkloom: unrecognized option '--nonsense'\nCouldn't process command line."),
        ("info -m 1", "Please specify both major number and minor number.\nCouldn't process command line."),
        ("create a -n --table t", "--table and --notable are incompatible.\nCouldn't process command line."),
        ("ls --tree -o x", "Tree options not recognised: x.\nCouldn't process command line."),
        ("ls -o x", "Option not recognised: x.\nCouldn't process command line."),
        ("info --manglename x", "Unknown name mangling mode.\nCouldn't process command line."),
        ("info -c --headings x", "Unknown headings type.\nCouldn't process command line."),
        ("suspend a --timeout x", "'x' is not a valid float range.\nCouldn't process command line."),
    ],
)
def test_what_is_wrong_is_said_in_dmsetups_words(run: Run, words: str, says: str) -> None:
    told = run(*words.split())
    assert told.status == 1
    assert told.out == ""
    assert says in told.err


# Help


def test_every_verb_is_in_the_help_under_its_title(run: Run) -> None:
    told = run("--help").out
    for title, verbs in SECTIONS.items():
        assert f"{title}:" in told
        assert all(f"  {name}" in told for name in verbs)


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.dmsetup])
def test_every_verb_has_help_that_hides_what_does_nothing(run: Run, verb: str) -> None:
    told = run(verb, "--help")
    assert told.status == 0
    assert told.out.startswith(f"Usage: blkloom {verb}")
    assert "--udevcookie" not in told.out
    assert run("help", verb).out == told.out


def test_help_and_listing_verbs_load_neither_numpy_nor_rich_nor_the_engine() -> None:
    script = (
        "import sys; sys.argv = ['blkloom', '--help']\n"
        "from blkloom.cli.main import main\n"
        "try: main()\n"
        "finally: print([m for m in ('numpy', 'rich', 'msgspec', 'asyncio', 'blkloom._engine') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ls_loads_neither_numpy_nor_rich_nor_the_engine(tmp_path: Path) -> None:
    script = (
        "import sys; import blkloom.cli.ls, blkloom.cli.info, blkloom.cli.create, blkloom.cli.connecting\n"
        "print([m for m in ('numpy', 'rich', 'blkloom._engine') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_shell_completes_names_without_starting_a_supervisor(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "BLKLOOM_RUN_DIR": str(tmp_path / "none"),
        "_BLKLOOM_COMPLETE": "bash_complete",
        "COMP_WORDS": "blkloom remove x",
        "COMP_CWORD": "2",
    }
    command = Path(sys.executable).with_name("blkloom")
    done = subprocess.run([command], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert not (tmp_path / "none").exists()
