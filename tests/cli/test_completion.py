"""What the command line says without loading any library, and the completion scripts of shells."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import keeplora
from keeplora.cli import main as cli
from keeplora.cli.completion import FLAGS, script_of

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "matplotlib", "pydantic")


def loaded_by(code):
    """Return which heavy libraries a process has loaded after some code, and what it printed."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, last = ended.stdout.strip().splitlines()
    return json.loads(last), "\n".join(printed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "keeplora COMMAND --help explains"),
        ([], "keeplora COMMAND --help explains"),
        (["--version"], "keeplora 0"),
        (["completion", "bash"], "complete -o default"),
        (["trian"], ""),
    ],
    ids=str,
)
def test_help_version_and_completion_load_no_library(arguments, said):
    code = f"from keeplora.cli.main import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass"
    found, printed = loaded_by(code)
    assert found == []
    assert said in printed


@pytest.mark.parametrize("module", ["errors", "progress", "registry"])
def test_what_everything_may_use_loads_no_library(module):
    assert loaded_by(f"import keeplora.{module}")[0] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("config", {"torch", "transformers", "peft", "datasets"}),
        ("task", {"transformers", "peft", "datasets"}),
        ("runs.atomic_store", {"transformers", "peft", "datasets", "accelerate"}),
        ("evaluation.accuracy_matrix", {"transformers", "peft", "datasets", "torch"}),
        ("evaluation.capacity", {"transformers", "peft", "datasets", "torch"}),
    ],
)
def test_a_module_loads_no_library_that_it_does_not_use(module, unwanted):
    assert not set(loaded_by(f"import keeplora.{module}")[0]) & unwanted


def test_every_public_name_loads_and_an_unknown_one_is_named():

    assert all(getattr(keeplora, name) is not None for name in keeplora.__all__)
    assert len(keeplora.__all__) == 16
    with pytest.raises(AttributeError, match="module 'keeplora' has no attribute 'nothing'"):
        _ = keeplora.nothing


@pytest.mark.parametrize("name", cli.commands())
def test_the_list_of_commands_says_what_each_says_itself(name):
    function = cli._function(name)
    assert function.__doc__.splitlines()[0] == cli.commands()[name]["summary"]


def tool():
    spec = importlib.util.spec_from_file_location("tool", Path(__file__).parents[2] / "tools" / "completion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_of_flags_is_that_of_the_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert json.loads(FLAGS.read_text()) == tool().all_flags(), "run tools/completion.py"


def completed(words):
    """Return what bash offers for the last of some words."""
    script = script_of("bash")
    ask = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _keeplora keeplora "{words[-1]}"'
    ended = subprocess.run(
        ["bash", "-c", f'{script}\n{ask}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    return ended.stdout.split()


def test_bash_completes_commands_and_flags():
    assert completed(["keeplora", "ex"]) == ["export"]
    assert completed(["keeplora", "run", "--lea"]) == ["--learning-rate"]
    assert completed(["keeplora", "run", "--lambda"]) == ["--lambda-1", "--lambda-2"]
    assert completed(["keeplora", "demo", "--lea"]) == []
    assert completed(["keeplora", "run", "runs"]) == [], "paths are the shell's own"


def test_the_other_shells_get_the_same_flags():
    assert "bashcompinit" in script_of("zsh")
    assert '"__fish_seen_subcommand_from run" -l learning-rate' in script_of("fish")
