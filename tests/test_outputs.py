"""Files that are whole when they are there, folders that are tried first, lines for a terminal."""

import json
import os
import resource
import stat
from contextlib import contextmanager

import pytest

from fused_rl.system import outputs
from fused_rl.system.outputs import (
    UnusableFolder,
    Unwritable,
    one_line,
    read_json,
    replacing,
    try_folder,
)


@contextmanager
def files_of_at_most(count):
    """As on a disk with so much room left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_takes_results_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    try_folder(folder, "log.json")
    try_folder(folder, "log.json")
    assert list(folder.iterdir()) == []


def test_folders_that_take_none(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there" / "log.json").mkdir(parents=True)
    for folder, complaint in (
        (tmp_path / "file", "results need a folder"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "there", r"log\.json: it is a folder"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(UnusableFolder, match=complaint):
            try_folder(folder, "log.json")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_read_only(tmp_path):
    if os.geteuid() == 0:
        tmp_path = "/proc/self"
    else:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UnusableFolder, match="cannot write results to"):
        try_folder(outputs.Path(tmp_path))


def test_a_disk_without_room_is_found_out_first(tmp_path):
    with files_of_at_most(2**16), pytest.raises(UnusableFolder, match="cannot write results"):
        try_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_outlives_what_goes_wrong(tmp_path):
    path = tmp_path / "log.json"
    outputs.write_json(path, {"run": 1})
    with files_of_at_most(2**16), pytest.raises(Unwritable, match=r"cannot write .*log\.json: "):
        outputs.write_json(path, {"run": "x" * 2**17})
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half of")
        raise KeyboardInterrupt
    assert read_json(path) == {"run": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["log.json"]
    with replacing(path) as partial:
        partial.write_text("2")
        assert partial.suffix == ".json" and read_json(path) == {"run": 1}
    assert read_json(path) == 2


def test_files_have_the_permissions_of_any_other(tmp_path):
    outputs.write_json(tmp_path / "a", 1)
    (tmp_path / "b").write_text("1")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"no", "Expecting value"),
        (b"", "Expecting value"),
        (b"\xff\xfe\xfd", "no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"1" * 5000, "no JSON"),
        (b" " * (2**24 + 1), "larger than 16 MiB"),
    ],
)
def test_what_is_no_json(data, complaint, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=complaint):
        read_json(path)


def test_json_of_any_kind(tmp_path):
    path = tmp_path / "c.json"
    for value in (None, [], {"a": [1.5, "\ud800"]}):
        path.write_text(json.dumps(value))
        assert read_json(path) == value


def test_a_line_is_one_and_printable():
    assert one_line("a\n\tb \x1b[31mred\x07 é") == r"a b \x1b[31mred\x07 é"
    assert one_line("\ud800\u202e") == r"\ud800\u202e"
    long = one_line("a" * 10**6 + "end")
    assert len(long) < 420 and " ... " in long and long.endswith("end")
