"""What the README shows is run as it stands there; what the other pages name is there."""

import ast
import importlib
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
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def keeplora_commands(text: str) -> list[str]:
    """Return the commands in the shell blocks of a page, and those that stand alone in backticks."""
    lines = [line for block in blocks("bash", text) for line in block.splitlines()]
    inline = [" ".join(found.split()) for found in re.findall(r"`(keeplora [a-z]+ [^`]*)`", text)]
    parts = [part.split("#")[0].strip() for line in lines for part in line.split(" && ")]
    placeholder = r"\b[A-Z]+\b|\.\.\.|>>|--help"
    whole = [command for command in inline if "--" in command and not re.search(placeholder, command)]
    return [part for part in parts if "keeplora " in part] + whole


COMMANDS = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in keeplora_commands(page.read_text())]


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


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_keeplora_command_is_understood(page, command, monkeypatch):
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
    assert list(asked) == arguments[:1]
    if page == "README.md":
        assert "runs/" in str(asked[arguments[0]])


@pages
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            file, _, heading = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]


@pages
def test_every_import_of_a_python_example_is_there(page):
    for block in blocks("python", page.read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "keeplora":
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pages
def test_every_file_of_the_project_that_a_page_names_is_there(page):
    for name in re.findall(r"`((?:src|tests|benchmarks|docs|tools)/[\w/.-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python ((?:benchmarks|tools)/\w+\.py)", page.read_text()):
        assert (ROOT / name).exists(), name


def test_the_test_command_is_the_one_that_ci_runs():
    script = subprocess.run(
        ["bash", "-c", r"sed -n '/<!-- test command -->/,/^```$/p' README.md | sed '/<!--/d; /^```/d'"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert script.strip().endswith("./check")
    assert script.strip() in README
    assert "test command" in (ROOT / ".ci" / "run").read_text()
