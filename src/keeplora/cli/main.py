"""The command line: what it can do, and how each command is found. A command's own libraries load when it is called."""

import difflib
import importlib
import logging
import os
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from keeplora.errors import printable

console = Console()
errors = Console(stderr=True)

DESCRIPTION = "Teach a pre-trained vision-language model one new domain after another, without losing what it knew."

GRACE = 5.0  # Seconds that a process waits with its error for the first one to have told its own.

TRACEBACK = "KEEPLORA_TRACEBACK"  # Set this variable to see where an error was raised.


@cache
def commands() -> dict[str, dict[str, Any]]:
    """Return what `commands.toml` says of every command: its file in this folder, and its help."""
    return tomllib.loads(Path(__file__).with_name("commands.toml").read_text())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user did wrong ends with one message and a non-zero exit."""
    with _silenced() if _rank() else nullcontext():
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    logging.getLogger("keeplora").setLevel(logging.INFO)
    # peft reads it of every model of transformers; no user can do anything about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It advises to fetch kernels from a hub; we never do.
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        _show_help()
    elif name == "--version":
        console.print(f"keeplora {version('keeplora')}", highlight=False)
    elif name not in commands():
        near = difflib.get_close_matches(name, commands(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        errors.print(f"[bold red]error:[/] unknown command {escape(repr(name))}{hint}", highlight=False)
        errors.print(f"Commands: {', '.join(commands())}", highlight=False)
        sys.exit(2)
    else:
        _call(name, arguments[1:])
        return
    sys.exit(0 if arguments else 2)


def _rank() -> int:
    """Return the number of this process among those that a launcher started."""
    rank, number = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and number.isdecimal() and int(number) > 1 else 0


@contextmanager
def _silenced() -> Iterator[None]:
    """Leave it to the first process to say what all would say."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _show_error(message: str) -> None:
    """Show an error; if the first process has it too, a launcher ends this one before it says so again."""
    place, which = errors, ""
    if number := _rank():
        time.sleep(GRACE)
        place, which = Console(file=sys.__stderr__), f" in process {number}"
    place.print(f"[bold red]error{which}:[/] {escape(printable(message))}", soft_wrap=True, highlight=False)


def _function(name: str) -> Callable[..., Any]:
    """Return a command's function; tyro shows the help of `commands.toml` as it finds it, in the docstring."""
    told = commands()[name]
    function: Callable[..., Any] = getattr(importlib.import_module(f"keeplora.cli.{told['file']}"), name)
    arguments = [f"    {argument}: {text}" for argument, text in told.get("arguments", {}).items()]
    args = ["Args:", *arguments] if arguments else []
    function.__doc__ = "\n".join([told["summary"], "", told.get("text", ""), "", *args])
    return function


def _call(name: str, arguments: list[str]) -> None:
    """Call a command; an error that a user can cure ends with its message alone."""
    try:
        import tyro  # noqa: PLC0415 (it takes a fifth of a second, and the help of all commands does without it)

        # Nobody gives None: that is what a flag is that is left out.
        tyro.cli(_function(name), prog=f"keeplora {name}", args=arguments, config=(tyro.conf.DisallowNone,))
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        _show_error(message)
        sys.exit(1)
    except _lack_of_resources() as error:
        message = " ".join(str(error).split()) or type(error).__name__
        _show_error(message)
        errors.print(
            "Memory or disk ran out, or could not be used. A run keeps what it has finished; the same command,"
        )
        errors.print("with less batch_size or more space, resumes it.")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("[bold red]interrupted[/]; a run keeps what it has finished, and the same command resumes it")
        sys.exit(130)


def _lack_of_resources() -> tuple[type[BaseException], ...]:
    """Return what the libraries that are loaded raise where memory or disk run out."""
    loaded = [(sys.modules.get("torch"), "OutOfMemoryError"), (sys.modules.get("safetensors"), "SafetensorError")]
    return (MemoryError, *(getattr(library, name) for library, name in loaded if library is not None))


def _show_help() -> None:
    console.print(f"usage: keeplora COMMAND [OPTIONS]\n\n{DESCRIPTION}\n", highlight=False, markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(no_wrap=True, style="bold")
    for name, told in commands().items():
        table.add_row(name, told["summary"])
    console.print(table)
    console.print("\nStart with keeplora demo. keeplora COMMAND --help explains each command.", highlight=False)
    console.print("Example: keeplora run --benchmark birds.toml --output runs/birds", highlight=False)
