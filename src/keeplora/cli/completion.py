"""Completion scripts of shells, made of a list of every command's flags that comes with the package."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

console = Console()

FLAGS = Path(__file__).with_name("completion.json")
"""The flags of every command, which `python tools/completion.py` writes; completion.bash lies beside them."""


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]) -> None:
    """Print the completion script of a shell: bash, zsh or fish."""
    console.print(script_of(shell), markup=False, highlight=False, soft_wrap=True)


def script_of(shell: str) -> str:
    """Return the completion script of a shell."""
    flags: dict[str, list[str]] = json.loads(FLAGS.read_text())
    if shell == "fish":
        commands = f'complete -c keeplora -n __fish_use_subcommand -a "{" ".join(flags)}"'
        lines = [
            f'complete -c keeplora -n "__fish_seen_subcommand_from {name}" -l {flag.removeprefix("--")}'
            for name, own in flags.items()
            for flag in own
        ]
        return "\n".join([commands, *lines])
    cases = "\n".join(f'    *-{name}) words="{" ".join(own)}" ;;' for name, own in flags.items())
    script = FLAGS.with_suffix(".bash").read_text().rstrip()
    script = script.replace("COMMANDS", " ".join(flags)).replace("CASES", cases)
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script
