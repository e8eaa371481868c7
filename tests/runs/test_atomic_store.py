"""Files that change together or not at all: whatever was handed in, and wherever the power goes."""

import hashlib
import os
import sys
import tempfile
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from keeplora.runs import atomic_store as disk
from keeplora.runs.atomic_store import Store
from keeplora.runs.manifest import locked, new_manifest, read_manifest

OPERATIONS = ("write_through", "rename", "remove", "flush")

FILES = st.sampled_from(["top", "d/x", "d/y", "e/f/z", "unfinished/u", "unfinished/v"])
CONTENTS = st.binary(max_size=4)
WRITES = st.tuples(st.just("write"), FILES, CONTENTS)
REMOVALS = st.tuples(st.just("remove"), st.sampled_from(["top", "d/", "d/x", "e/", "unfinished/", "unfinished/u", "q"]))
FOLDERS = st.tuples(
    st.just("write_folder"),
    st.sampled_from(["d", "e/f"]),
    st.dictionaries(st.sampled_from(["x", "w", "in/v"]), CONTENTS, min_size=1, max_size=2),
)
COMMITS = st.lists(st.lists(st.one_of(WRITES, REMOVALS, FOLDERS), max_size=4), min_size=1, max_size=4)


class Crash(BaseException):
    """The power is gone."""


@contextmanager
def power_for(number):
    """Let the power go at the number-th change of the disk; what is written or removed then, is so by half."""
    counter = count()

    def wrap(name, real):
        def changed(*args):
            if next(counter) == number:
                if name == "write_through":
                    real(args[0], args[1][: len(args[1]) // 2])
                if name == "remove" and args[0].is_dir():
                    for path in [path for path in sorted(args[0].rglob("*")) if path.is_file()][::2]:
                        path.unlink()
                raise Crash
            return real(*args)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # What survives is what was written: the test has no real crash.
        for name in OPERATIONS:
            patch.setattr(disk, name, wrap(name, getattr(disk, name)))
        yield


def saving(files):
    def save(place):
        for name, content in files.items():
            disk.write_through(place / name, content)

    return save


def write_commits(folder, commits):
    """Hand in and commit."""
    store = Store(folder, new_manifest({}, []) | {"number": 0})
    for number, steps in enumerate([[], *commits]):
        for verb, name, *more in steps:
            getattr(store, verb)(name, *(map(saving, more) if verb == "write_folder" else more))
        store.manifest["number"] = number
        store.commit()


def states(commits):
    """Return what the folder must hold after every commit, by a plain dictionary."""
    files = {}
    found = [{}]
    for steps in commits:
        for verb, name, *more in steps:
            if verb != "write":
                prefix = f"{name}/" if verb == "write_folder" else name
                files = {other: content for other, content in files.items() if not other.startswith(prefix)}
            if verb == "write":
                files[name] = more[0]
            if verb == "write_folder":
                files |= {f"{name}/{inner}": content for inner, content in more[0].items()}
        found.append(dict(files))
    return found


def recovered(folder):
    """Open the folder as the next process does; return what it holds, less `run.json`."""
    manifest = read_manifest(folder)
    Store(folder, manifest).recover()
    files = tiny.tree(folder)
    del files["run.json"]
    assert Store(folder, manifest).damaged() == []
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return manifest["number"], files


@settings(deadline=None, derandomize=True, max_examples=150)
@given(commits=COMMITS)
@example(commits=[[("write", "d/x", b"1"), ("write_folder", "d", {"w": b"2"})]])
@example(commits=[[("write_folder", "d", {"x": b"1"}), ("write_folder", "d", {"w": b"2"})]])
@example(commits=[[("write", "d/x", b"1")], [("remove", "d/"), ("write", "d/x", b"2"), ("remove", "d/x")]])
@pytest.mark.slow
def test_the_folder_holds_what_was_committed(commits):
    with tempfile.TemporaryDirectory() as place, power_for(-1):
        write_commits(Path(place), commits)
        assert recovered(Path(place)) == (len(commits), states(commits)[-1])


@settings(deadline=None, derandomize=True, max_examples=250)
@given(commits=COMMITS, last=st.integers(0, 40), again=st.integers(0, 12))
@example(
    commits=[[("write", "d/x", b"1"), ("write", "top", b"2")], [("remove", "d/x"), ("remove", "top")]], last=7, again=9
)
@pytest.mark.slow
def test_wherever_the_power_goes_the_folder_holds_the_last_commit(commits, last, again):
    """It goes once while the folder is written, and once more while it is put in order again."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        try:
            with power_for(last):
                write_commits(folder, commits)
            before = len(commits)
        except Crash:
            before = None
        if not (folder / "run.json").exists():
            return  # Nothing was committed.
        number = read_manifest(folder)["number"]
        assert before in (number, None)
        try:
            with power_for(again):
                recovered(folder)
        except Crash:
            pass
        with power_for(-1):
            assert recovered(folder) == (number, states(commits)[number])


@pytest.mark.slow
def test_the_power_goes_at_every_single_change_of_a_stream_of_commits():
    commits = [
        [("write_folder", "d", {"x": b"1", "y": b"2"}), ("write", "unfinished/u", b"3"), ("write", "top", b"4")],
        [("write", "unfinished/v", b"5"), ("remove", "unfinished/u")],
        [("write_folder", "d", {"w": b"6"}), ("remove", "unfinished/"), ("remove", "top")],
        [("remove", "d/"), ("write", "d/x", b"7")],
    ]
    expected = states(commits)
    seen = set()
    for last in count():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            try:
                with power_for(last):
                    write_commits(folder, commits)
                break
            except Crash:
                if not (folder / "run.json").exists():
                    continue
            with power_for(-1):
                number, files = recovered(folder)
            assert files == expected[number], last
            seen.add(number)
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which file a number stands for")
def test_every_change_waits_for_the_disk_itself(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    disk.write_through(tmp_path / "new" / "x", b"x")
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "x")} <= set(synced)
    synced.clear()
    disk.rename(tmp_path / "new" / "x", tmp_path / "y")
    assert str(tmp_path) in synced
    synced.clear()
    (tmp_path / "new" / "deep").mkdir()
    (tmp_path / "new" / "deep" / "z").write_text("z")
    disk.flush(tmp_path / "new")
    assert {str(tmp_path / "new"), str(tmp_path / "new" / "deep"), str(tmp_path / "new" / "deep" / "z")} <= set(synced)


def test_a_file_that_leaves_with_the_commit_under_way_is_no_stranger(tmp_path):
    store = Store(tmp_path, new_manifest({}, []))
    for name in ("model/old", "model/other"):
        disk.write_through(tmp_path / name, b"x")
    store.manifest["leaving"] = ["model/old"]
    assert store.strangers() == [tmp_path / "model" / "other"]


@pytest.mark.parametrize("write", [disk.write_through, disk.write_atomically])
@pytest.mark.parametrize("name", ["x", "x.part", ".x.part", "lock"])
def test_what_is_written_never_follows_a_link(tmp_path, write, name):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "foreign"
    target.write_text("foreign")
    (tmp_path / "folder" / name).symlink_to(target)
    write(tmp_path / "folder" / "x", b"ours")
    assert target.read_text() == "foreign"
    assert (tmp_path / "folder" / "x").read_bytes() == b"ours"
    assert not (tmp_path / "folder" / "x").is_symlink()
    if name == "lock":
        with pytest.raises(ValueError, match="is a symbolic link"), locked(tmp_path / "folder"):
            pass
        assert target.read_text() == "foreign"


def test_a_folder_that_is_made_leaves_others_files_alone_and_stays_out_of_runs(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "theirs").write_text("x")
    with disk.made_whole(tmp_path / "out") as part:
        (part / "a").write_text("a")
    assert (tmp_path / ".out.part" / "theirs").read_text() == "x"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    (tmp_path / "out" / "run.json").write_text("{}")
    for inside in ("out/more", "out/deep/more"):
        with pytest.raises(ValueError, match="is inside the run directory"), disk.made_whole(tmp_path / inside):
            pass


def test_of_two_that_make_one_folder_at_once_one_is_refused(tmp_path):
    first, second = disk.made_whole(tmp_path / "out"), disk.made_whole(tmp_path / "out")
    for one, text in ((first, "first"), (second, "second")):
        (one.__enter__() / "a").write_text(text)
    second.__exit__(None, None, None)
    with pytest.raises(ValueError, match=r"another process has written .*out meanwhile"):
        first.__exit__(None, None, None)
    assert (tmp_path / "out" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
