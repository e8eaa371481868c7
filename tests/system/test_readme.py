"""What the README shows is run as it stands there."""

import re
import shlex
import subprocess
import tomllib
from functools import wraps
from pathlib import Path

import pytest

from keeplora.cli import main as cli
from keeplora.config import parse
from keeplora.data.benchmark import Benchmark

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [part for line in lines for part in line.split(" && ")]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_example_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[number], f"README.md, example {number + 1}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_the_benchmark_of_the_readme_is_one():
    (text,) = blocks("toml")
    benchmark = parse(Benchmark, {"name": "birds", **tomllib.loads(text)}, source="README.md")
    assert [task.name for task in benchmark.tasks] == ["garden", "seabirds"]


@pytest.mark.parametrize("command", [line for line in shell_commands() if "keeplora " in line])
def test_every_keeplora_command_is_understood(command, monkeypatch):
    asked, function_of = {}, cli._function

    def understood(name):
        """Take the command's arguments in its place."""

        @wraps(function_of(name))
        def ask(*args, **options):
            asked[name] = (args, options)

        return ask

    monkeypatch.setattr(cli, "_function", understood)
    arguments = shlex.split(command)[1:]
    cli.main(arguments)
    assert "runs/" in str(asked[arguments[0]])


def test_the_test_command_is_the_one_that_ci_runs():
    script = subprocess.run(
        ["bash", "-c", r"sed -n '/<!-- test command -->/,/^```$/p' README.md | sed '/<!--/d; /^```/d'"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert script.strip().endswith("./check")
    assert script.strip() in README
    assert "test command" in (ROOT / ".ci" / "run").read_text()
