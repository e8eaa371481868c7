"""Whatever a file holds, a command ends with one message: benchmarks, settings, and every JSON file of a run."""

import copy
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from keeplora.cli import main as cli
from keeplora.data import benchmark
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.models import registry
from keeplora.runs.atomic_store import write_atomically
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.manifest import manifest_bytes, read_manifest
from keeplora.training.trainer import TrainConfig

FUZZ = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# PEFT warns of settings that do nothing.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

FIRST = "tasks/01-task0"

ODD = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.5, 0.5, 1e308, 1e-320, float("inf"),
    float("nan"), "", " ", "0", "x", "\0", "a\0b", "\x1b[31m",
    "[/red]", "[bold]", "{}", "{0}", "%s", "..", "../../x", "/",
    ".toml", "~", "\ufeff", "\U0001f600", "\u202e", "a" * 300, "a/b", "-", "--help", "keeplora", "mini", "inflora", [],
    [[]], [None], [0], ["x"], ["x", "x"], {}, {"": ""}, {"x": {"x": {}}}, {"a.b": 1}, [{}],
]  # fmt: skip
"""What is put in the place of a value."""

ODD_JSON = [*ODD, "\ud800", 1e999, [[[[]]]] * 3]

TEXTS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000,
    b'{"a":' * 100_000, b"9" * 5000, b"null", b"[]", b"3", b'"x"',
    b"NaN", b"{", b"\xed\xa0\x80", b"x = " + b"[" * 5000, b"x = " + b"9" * 5000, b"x = 1979-05-27", b"[x]\n[x]",
    b"seed = \xff", b"seed = 1\nseed = 2", b"a" + b".a" * 5000 + b" = 1", b"x = " + b"{a=" * 3000,
]  # fmt: skip
"""What is put in the place of a whole file."""


def paths_of(value, path=()):
    """Return the place of every value inside a nested one, its own first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in paths_of(item, (*path, key)))]


def mutate(data, value, odd):
    """Return a copy with one to three changes: a value exchanged, removed, doubled, wrapped, or under another name."""
    whole = [copy.deepcopy(value)]
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = data.draw(st.sampled_from(paths_of(whole[0])))
        *above, key = (0, *path)
        holder = whole
        for step in above:
            holder = holder[step]
        change = data.draw(st.sampled_from(["put", "put", "put", "remove", "rename", "wrap", "move", "add"]))
        if change == "put" or (change in ("remove", "rename") and holder is whole):
            holder[key] = copy.deepcopy(data.draw(st.sampled_from(odd)))
        elif change == "remove":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(["", "x", "a\0", "tasks", "a.b", "é"]))] = holder.pop(key)
        elif change == "wrap":
            holder[key] = data.draw(st.sampled_from([[holder[key]], {"x": holder[key]}, str(holder[key])]))
        elif change == "move":
            place = data.draw(st.sampled_from(paths_of(whole[0])))
            found = whole[0]
            for step in place:
                found = found[step]
            holder[key] = copy.deepcopy(found)
        elif isinstance(holder[key], dict):
            holder[key][data.draw(st.sampled_from(["", "x", "é", "\0"]))] = copy.deepcopy(
                data.draw(st.sampled_from(odd))
            )
        elif isinstance(holder[key], list):
            holder[key].append(copy.deepcopy(data.draw(st.sampled_from(odd))))
    return whole[0]


def toml_of(value):
    """Write a value as TOML, in one line; what TOML does not know becomes a text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "")


def toml_file(values):
    if not isinstance(values, dict):
        return toml_of(values)
    return "".join(f"{json.dumps(key)} = {toml_of(value)}\n" for key, value in values.items())


def outcome(capsys, *arguments):
    """Run a command; it must end well or with a message. Return its exit code and what it said."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    said = re.sub(r"\x1b\[[0-9;]*m", "", shown.out + shown.err)
    assert code in (0, None, 1, 2), code
    assert "Traceback" not in said
    if code:
        assert len(said.strip()) > 10, "nothing was said"
    return code, said


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A complete run of two tasks, with heads."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = RunConfig(
        benchmark=str(tiny.write_benchmark(folder, tasks=2, per_class=3)),
        model=str(tiny.save_dual_encoder(folder / "model")),
        output=folder / "run",
        train=TrainConfig(epochs=1, batch_size=6, learning_rate=0.01),
        options=KeepLoRAConfig(rank=2, classifier="cosine"),
    )
    run(config)
    (folder / "mini.toml").write_text((folder / "colors.toml").read_text())
    return folder


@pytest.fixture(autouse=True)
def elsewhere(place, tmp_path, monkeypatch):
    """Nothing is learned, nothing is looked up elsewhere, and what is written is written here."""

    def learn(*args):
        raise ValueError("nothing is learned in this test")

    monkeypatch.setattr(sys.modules["keeplora.runs.loop"], "learn", learn)
    monkeypatch.setattr(benchmark, "BENCHMARKS", place)
    monkeypatch.setitem(registry.EMBEDDED, "mini", place / "model")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


# Files of a run


def rebuild(place, name, content):
    """Put another content into a fresh copy of the run, with its hash: as it would be if a run had written it."""
    shutil.rmtree("run", ignore_errors=True)
    shutil.rmtree("new", ignore_errors=True)
    folder = Path(shutil.copytree(place / "run", "run", copy_function=linked))
    (folder / name).unlink()
    if name == "run.json":
        (folder / name).write_bytes(content)
        return
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / "run.json").unlink()
    write_atomically(folder / "run.json", manifest_bytes(manifest))


def linked(source, target):
    """Copy the small files only."""
    if source.endswith((".json", ".html")):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


COMMANDS = {
    "resume": ["resume", "run"],
    "certify": ["certify", "run", "--layers", "--json", "proof.json"],
    "undo": ["undo", "run", "task0", "--output", "new"],
    "export": ["export", "run", "--format", "adapter", "--output", "new"],
    "export each": ["export", "run", "--format", "adapters", "--output", "new"],
    "export merged": ["export", "run", "--format", "merged", "--output", "new"],
    "evaluate": ["evaluate", "run"],
    "fork": ["run", "--fork", "run", "--output", "new"],
    "continue": ["run", "--continue", "run", "--benchmark", "more.toml"],
}

JSONS = ["run.json", f"{FIRST}/task.json", "metrics.json", f"{FIRST}/adapter/adapter_config.json"]


def encoded(name, value):
    if name == "run.json" and isinstance(value, dict):
        return manifest_bytes({key: item for key, item in value.items() if key != "checksum"})
    return json.dumps(value).encode()


def more_tasks(place):
    text = (place / "colors.toml").read_text().replace("data", f"{place}/data").replace("task", "more")
    Path("more.toml").write_text(text.replace("[[more", "[[task"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", JSONS)
@settings(FUZZ, max_examples=3)
@given(data=st.data())
@pytest.mark.slow
def test_no_json_of_a_run_ends_a_command_without_a_message(place, capsys, command, name, data):
    more_tasks(place)
    value = mutate(data, json.loads((place / "run" / name).read_text()), ODD_JSON)
    rebuild(place, name, encoded(name, value))
    outcome(capsys, *COMMANDS[command])


@pytest.mark.slow
@pytest.mark.parametrize("name", JSONS)
@settings(FUZZ, max_examples=40)
@given(command=st.sampled_from(list(COMMANDS)), data=st.data())
def test_no_json_of_a_run_ends_any_command_without_a_message(place, capsys, name, command, data):
    more_tasks(place)
    value = mutate(data, json.loads((place / "run" / name).read_text()), ODD_JSON)
    rebuild(place, name, encoded(name, value))
    outcome(capsys, *COMMANDS[command])


@pytest.mark.parametrize("content", TEXTS, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("name", ["run.json", f"{FIRST}/task.json", f"{FIRST}/adapter/adapter_config.json"])
def test_a_file_of_a_run_that_is_something_else_is_named(place, capsys, name, content):
    rebuild(place, name, content)
    for command in ("certify", "export"):
        code, said = outcome(capsys, *COMMANDS[command])
        assert code == 1
        assert name in said or "cannot be checked" in said


@pytest.mark.parametrize(
    ("name", "path", "value", "expected"),
    [
        ("run.json", ("config", "train"), None, "train: "),
        ("run.json", ("config", "tasks", "task0"), {}, "'name' is missing"),
        ("run.json", ("config", "tasks"), None, "tasks: "),
        ("run.json", ("config", "method"), ["keeplora"], "method: "),
        ("run.json", ("zero_shot",), [1.0], "1 scores for 2 tasks"),
        ("run.json", ("zero_shot", 1), "x", "zero_shot.1: "),
        ("run.json", ("start", "zero_shot", "peak_memory_mb"), [], "start.zero_shot.peak_memory_mb: "),
        ("run.json", ("model_digest",), None, "model_digest: "),
        (f"{FIRST}/task.json", ("scores",), None, "scores: "),
        (f"{FIRST}/task.json", ("scores",), [1.0, 2.0, 3.0], "3 scores for 2 tasks"),
        (f"{FIRST}/task.json", ("scores", 0), float("nan"), "scores.0: "),
        (f"{FIRST}/task.json", ("phases", "train"), 3, "phases.train: "),
        (f"{FIRST}/task.json", ("merged",), "no", "merged: "),
        (f"{FIRST}/adapter/adapter_config.json", ("r",), 0, "r: "),
        (f"{FIRST}/adapter/adapter_config.json", ("lora_alpha",), "x", "lora_alpha: "),
        (f"{FIRST}/adapter/adapter_config.json", ("peft_type",), "VERA", "peft_type: "),
        (f"{FIRST}/adapter/adapter_config.json", ("loftq_config",), [], "loftq_config = []"),
        (f"{FIRST}/adapter/adapter_config.json", ("x",), 1, "x = 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(place, capsys, name, path, value, expected):
    whole = json.loads((place / "run" / name).read_text())
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    rebuild(place, name, encoded(name, whole))
    code, said = outcome(capsys, *COMMANDS["export"])
    assert code == 1
    assert f"{name}" in said
    assert expected in said


@pytest.mark.parametrize("change", ["certificate", "layers", "one", "width"])
def test_a_damaged_certificate_is_named_with_its_task(place, capsys, change):
    name = f"{FIRST}/task.json"
    whole = json.loads((place / "run" / name).read_text())
    layers = whole["certificate"]["layers"]
    first = next(iter(layers))
    if change == "certificate":
        whole["certificate"] = 3
    elif change == "layers":
        whole["certificate"]["layers"] = [1]
    elif change == "one":
        del layers[first]
    else:
        layers[first]["protected_dims"] += 1
    rebuild(place, name, encoded(name, whole))
    code, said = outcome(capsys, *COMMANDS["resume"])
    assert code == 1
    assert "the certificate in task.json of task 'task0'" in said


# Benchmarks and settings


def toml_case(data, place, kind):
    """Return what is changed, a command, and the values in its file."""
    benchmark = {
        "name": "colors", "description": "x",
        "tasks": [
            {"name": "task0", "path": f"{place}/data0", "reader": "folder", "template": "a drawing of a {}.",
             "class_names": {"red": "blue thing"}, "epochs": 1},
            {"name": "task1", "path": f"{place}/data1", "image_column": "image", "label_column": "label"},
        ],
        "defaults": {"train": {"epochs": 1, "batch_size": 6}, "keeplora": {"rank": 2, "train": {"learning_rate": 0.1}}},
        "compare": {"learning_rate": [0.1], "search": {"keeplora": {"feature_energy": [0.9]}}, "common": {"rank": 2}},
    }  # fmt: skip
    run_settings = {
        "benchmark": f"{place}/colors.toml", "model": f"{place}/model", "method": "keeplora", "seed": 0,
        "output": "out",
        "evaluation": "test", "order": 0, "first_tasks": 1, "more": [], "without": [], "save_model": False,
        "checkpoint_steps": 3, "checkpoint_minutes": 1.0,
        "train": {"epochs": 1, "batch_size": 6, "learning_rate": 0.1, "weight_decay": 0.0, "schedule": "cosine",
                  "warmup": 0.0, "mixed_precision": "no", "accumulation": 1},
        "options": {"rank": 2, "alpha": 1.0, "weight_energy": {"vision": 0.5, "text": 0.5}, "targets": ["q_proj"]},
    }  # fmt: skip
    values = mutate(data, benchmark if kind == "benchmark" else run_settings, ODD)
    shutil.rmtree("out", ignore_errors=True)
    Path("fuzzed.toml").write_text(toml_file(values), encoding="utf-8")
    flag = ["--benchmark" if kind == "benchmark" else "--config", "fuzzed.toml"]
    where = ["--model", f"{place}/model"] if kind == "benchmark" else []
    command = data.draw(st.sampled_from(["run", "run", "doctor"]))
    more = ["--no-duplicates"] if command == "doctor" else ["--output", "out"] if kind == "benchmark" else []
    return (kind, command), [command, *flag, *where, *more], values


@pytest.mark.parametrize("kind", ["benchmark", "settings"])
@settings(FUZZ, max_examples=40)
@given(data=st.data())
@pytest.mark.slow
def test_no_toml_ends_a_command_without_a_message(place, capsys, kind, data):
    _, arguments, _ = toml_case(data, place, kind)
    outcome(capsys, *arguments)


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "\x1b[31m", "\u202e", "x" * 201, "\U0001f600" * 51, "", ".x", "a/b"], ids=repr
)
def test_a_task_name_that_no_folder_can_have_is_refused_before_anything_is_learned(place, capsys, name):
    tasks = [{"name": name, "path": f"{place}/data0"}]
    Path("fuzzed.toml").write_text(f"tasks = {toml_of(tasks)}\n", encoding="utf-8")
    code, said = outcome(capsys, "run", "--benchmark", "fuzzed.toml", "--output", "out")
    assert code == 1
    assert "cannot name a folder" in said or "is too long for a folder" in said
    assert not Path("out").exists()


def test_train_settings_of_a_method_that_are_no_table_are_named(place, capsys):
    Path("fuzzed.toml").write_text((place / "colors.toml").read_text() + "[defaults.keeplora]\ntrain = 3\n")
    code, said = outcome(capsys, "run", "--benchmark", "fuzzed.toml")
    assert code == 1
    assert "benchmark 'fuzzed.toml' [defaults.keeplora]: train = 3 must be a table" in said


@pytest.mark.parametrize("content", TEXTS, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("flag", ["--benchmark", "--config"])
def test_a_toml_file_that_is_something_else_is_named(place, capsys, flag, content):
    Path("fuzzed.toml").write_bytes(content)
    for command in ("run", "doctor"):
        code, said = outcome(capsys, command, flag, "fuzzed.toml", "--model", place / "model")
        assert code == 1 or (flag == "--config" and content == b"")
        assert "fuzzed.toml" in said or content == b""
