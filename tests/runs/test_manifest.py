"""`run.json`: any manifest comes back as it was, and whatever else the file holds is told apart and named."""

import json
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keeplora.config import differences
from keeplora.errors import InUseError
from keeplora.runs.manifest import RUN_FORMAT, locked, manifest_bytes, new_manifest, read_manifest

QUICK = settings(deadline=None, derandomize=True, max_examples=100)

TEXTS = st.text(max_size=8).filter(str.isprintable)
NAMES = TEXTS.filter(bool)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(NAMES, PLAIN, max_size=4)
FILES = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}(/[a-z.]{1,4}[a-z])?", fullmatch=True), st.text(max_size=8), max_size=3
)

WHOLE = {
    **new_manifest({"seed": 0, "model": "a model"}, ["one", "zwei"]),
    "versions": {"torch": "2"},
    "tasks_finished": 1,
    "files": {"tasks/01-one/task.json": "0" * 64, "model/config.json": "1" * 64},
    "zero_shot": [12.5, 1e-7],
}


@st.composite
def manifests(draw):
    tasks = draw(st.lists(NAMES, max_size=3))
    required = {
        "format": RUN_FORMAT,
        "config": draw(TABLES),
        "tasks": tasks,
        "tasks_finished": draw(st.integers(0, len(tasks))),
        "phase": draw(NAMES),
        "files": draw(FILES),
    }
    others = {key: value for key, value in draw(TABLES).items() if key not in {*required, "checksum", "leaving"}}
    return dict(draw(st.permutations(list({**others, **required}.items()))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("manifest")


def refused(folder, content):
    """Return what is said of a `run.json` that must not be taken; the file must be named."""
    (folder / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json") as caught:
        read_manifest(folder)
    assert str(folder / "run.json") in str(caught.value)
    assert type(caught.value) is ValueError
    return str(caught.value)


# What is written, is read


@QUICK
@given(manifest=manifests())
def test_any_manifest_comes_back_as_it_was(folder, manifest):
    (folder / "run.json").write_bytes(manifest_bytes(manifest))
    assert read_manifest(folder) == manifest
    assert list(read_manifest(folder)) == list(manifest)


# What was changed


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(folder):
    content = manifest_bytes(WHOLE)
    for place in range(len(content)):
        for bit in range(8):
            refused(folder, content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])


@pytest.mark.slow
def test_every_truncation_and_every_deleted_or_doubled_byte_is_noticed(folder):
    content = manifest_bytes(WHOLE)
    for place in range(len(content)):
        refused(folder, content[:place])
        refused(folder, content[place + 1 :])
        refused(folder, content[:place] + content[place + 1 :])
        refused(folder, content[: place + 1] + content[place:])


@QUICK
@given(manifest=manifests(), data=st.data())
@pytest.mark.slow
def test_any_changed_byte_of_any_manifest_is_noticed(folder, manifest, data):
    content = manifest_bytes(manifest)
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    refused(folder, content[:place] + bytes([byte]) + content[place + 1 :])


@QUICK
@given(place=st.integers(0, len(manifest_bytes(WHOLE))), more=st.binary(min_size=1, max_size=5))
@example(place=0, more=b"\xef\xbb\xbf")
@example(place=len(manifest_bytes(WHOLE)), more=b"\n")
@example(place=1, more=b" ")
def test_any_inserted_bytes_are_noticed(folder, place, more):
    content = manifest_bytes(WHOLE)
    refused(folder, content[:place] + more + content[place:])


def test_a_key_that_comes_twice_is_noticed(folder):
    content = manifest_bytes(WHOLE)
    for line in content.splitlines()[1:-1]:
        if line.startswith(b' "') and line.endswith(b","):
            refused(folder, content.replace(line, line + b"\n" + line, 1))


# What is another thing


@QUICK
@given(value=PLAIN | st.dictionaries(st.sampled_from([*WHOLE, "checksum"]), PLAIN))
@pytest.mark.slow
def test_any_other_json_is_refused(folder, value):
    refused(folder, json.dumps(value).encode())


@QUICK
@given(content=st.binary(max_size=40))
@example(content=b"\xff\xfe{\x00}\x00")
@example(content="[]".encode("utf-16"))
def test_any_other_bytes_are_refused(folder, content):
    refused(folder, content)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        '{"format": ' + "9" * 5000 + "}",
        '{"format": NaN}',
        '{"format": -Infinity}',
        '{"format": 1e999}',
        '"\\ud800"',
        '{"format": 2, "format": 2}',
    ],
    ids=lambda text: text[:16],
)
def test_json_that_no_reader_wants_is_refused(folder, text):
    refused(folder, text.encode())


def test_a_number_with_too_many_digits_is_named_even_where_all_else_is_right(folder):
    whole = manifest_bytes(WHOLE).decode()
    refused(folder, whole.replace('"seed": 0', '"seed": ' + "9" * 5000).encode())


@pytest.mark.slow
def test_a_nesting_too_deep_to_be_written_again_is_refused(folder):
    for depth in range(600, 1000, 9):
        for left, right in ((b"[", b"]"), (b'{"a":', b"}")):
            nested = b'"seed": ' + left * depth + b"0" + right * depth
            refused(folder, manifest_bytes(WHOLE).replace(b'"seed": 0', nested))


@pytest.mark.parametrize("key", ["format", "config", "tasks", "tasks_finished", "phase", "files"])
@pytest.mark.parametrize(
    "value", [None, True, False, -1, 0.5, 1e300, 2**70, "2", "", [1], [[]], {"a": 1}, [None]], ids=repr
)
def test_a_key_of_another_type_is_refused_although_the_checksum_is_right(folder, key, value):
    if (key == "phase" and isinstance(value, str)) or (key == "config" and isinstance(value, dict)):
        return
    refused(folder, manifest_bytes({**WHOLE, key: value}))


@pytest.mark.parametrize("key", ["format", "config", "tasks", "tasks_finished", "phase", "files"])
def test_a_missing_key_is_named_although_the_checksum_is_right(folder, key):
    assert key in refused(folder, manifest_bytes({name: value for name, value in WHOLE.items() if name != key}))


@pytest.mark.parametrize("found", [3.0, "3", "x", None, True, False, [3], {"format": 3}], ids=repr)
def test_a_format_that_is_no_whole_number_is_damage_not_another_version(folder, found):
    assert "damaged or not of keeplora" in refused(folder, manifest_bytes({**WHOLE, "format": found}))


@pytest.mark.parametrize("found", [0, 1, 2, 4, -5, 2**70])
def test_another_format_is_named_and_what_to_do(folder, found):
    assert f"has format {found}, " in refused(folder, manifest_bytes({**WHOLE, "format": found}))


def test_more_finished_tasks_than_there_are_is_refused(folder):
    assert "more tasks finished" in refused(folder, manifest_bytes({**WHOLE, "tasks_finished": 3}))


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "../x", "a/../../x", "a/.."])
@pytest.mark.parametrize("key", ["files", "leaving"])
def test_a_file_outside_the_run_is_refused(folder, name, key):
    value = {name: "0" * 64} if key == "files" else [name]
    assert name in refused(folder, manifest_bytes({**WHOLE, key: value}))


def test_a_folder_in_the_place_of_the_file_is_no_run(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        read_manifest(tmp_path)


# What differs between two configurations


def leaves(value, path=()):
    """Return what a nested table holds by its path, the slow and obvious way; an empty table is something too."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {place: leaf for key, inner in value.items() for place, leaf in leaves(inner, (*path, key)).items()}


CONFIGS = st.dictionaries(
    st.sampled_from(["seed", "train", "options", "tasks", "a", "a.b"]),
    st.recursive(
        st.integers(0, 2) | st.none() | st.sampled_from(["x", ""]),
        lambda inner: st.dictionaries(st.sampled_from(["a", "b", "a.b"]), inner, max_size=2),
        max_leaves=4,
    ),
)


@settings(QUICK, max_examples=400)
@given(before=CONFIGS, now=CONFIGS)
@example(before={"options": {}}, now={})
@example(before={"seed": None}, now={})
@example(before={"a": {"b": 1}}, now={"a.b": 1})
@example(before={"tasks": {"a.b": {"path": 1}}}, now={"tasks": {"a.b": {"path": 2}}})
@pytest.mark.slow
def test_differences_are_none_only_between_equal_values_and_name_every_key(before, now):
    found = differences(before, now)
    assert (found == []) == (before == now)
    old, new = leaves(before), leaves(now)
    missing = object()
    changed = [path for path in {*old, *new} if path and old.get(path, missing) != new.get(path, missing)]
    emptied = {path for path in changed if {} in (old.get(path), new.get(path))}
    changed = [
        path
        for path in changed
        if not (path in emptied and any(other[: len(path)] == path != other for other in changed))
    ]
    of_tasks = {path[1] for path in changed if path[0] == "tasks" and len(path) > 1}
    for path in changed:
        if path[0] != "tasks" or len(path) == 1:
            assert any(phrase.startswith(f"{'.'.join(path)} was ") for phrase in found), path
    if of_tasks:
        assert any(f"table of task {name!r}" in found[-1] for name in of_tasks)
        assert (f" and {len(of_tasks) - 1} more was" in found[-1]) == (len(of_tasks) > 1)


@QUICK
@given(config=TABLES, key=NAMES, value=PLAIN)
def test_one_changed_key_is_the_only_difference(config, key, value):
    config = {name: inner for name, inner in config.items() if name not in (key, "tasks") and inner != {}}
    if key == "tasks" or value in ({}, "the old one"):
        return
    (phrase,) = differences({**config, key: "the old one"}, {**config, key: [value]})
    assert phrase == f"{key} was 'the old one', is {[value]!r}"
    assert differences(config, json.loads(json.dumps(config))) == []


def test_a_difference_of_nothing_and_a_missing_key_says_which_is_missing():
    assert differences({"a": None}, {}) == ["a was None, is missing"]
    assert differences({}, {"a": {}}) == ["a was missing, is {}"]
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b was 1, is missing"]


def test_the_path_is_part_of_every_message(tmp_path):
    place = tmp_path / "a folder" / Path("run.json")
    place.parent.mkdir()
    assert "a folder/run.json" in refused(place.parent, b"x")


def test_a_file_system_without_locks_is_said_and_still_keeps_others_out(tmp_path, monkeypatch, caplog):
    def missing(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "_acquire", missing)
    with locked(tmp_path):
        assert "the file system has no locks" in caplog.text
        with pytest.raises(InUseError, match="is writing to"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\u202eb", "a\rb", "a\x07"])
@pytest.mark.parametrize("place", [("tasks", 0), ("config", "method"), ("config", "tasks")])
def test_texts_that_would_steer_a_terminal_are_damage(tmp_path, text, place):
    manifest = new_manifest({"method": "keeplora", "tasks": {"a": {}}}, ["a"])
    key, inner = place
    if inner == "tasks":
        manifest["config"]["tasks"] = {text: {}}
    else:
        manifest[key][inner] = text
    (tmp_path / "run.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(ValueError, match="damaged or not of keeplora") as caught:
        read_manifest(tmp_path)
    assert text not in str(caught.value)
