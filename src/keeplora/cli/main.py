"""The command line. Each subcommand is a typed function, here, in `ledger_commands` or in `doctor_command`."""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from keeplora.cli.doctor import doctor
from keeplora.cli.progress import Display
from keeplora.cli.runs import certify, evaluate, export, resume, show_capacity, show_run, undo
from keeplora.cli.tables import comparison_tables, matrix_table, principal_table
from keeplora.config import read_toml
from keeplora.data.cache import kept
from keeplora.report.charts import heat_maps
from keeplora.report.html import page
from keeplora.runs.atomic_store import write_atomically
from keeplora.runs.branch import fork as fork_run
from keeplora.runs.branch import with_more
from keeplora.runs.config import RunConfig, run_defaults
from keeplora.runs.loop import run as run_stream
from keeplora.runs.open import config_of, read_run
from keeplora.studies.compare.config import CompareConfig
from keeplora.studies.compare.process_pool import silence_libraries
from keeplora.studies.compare.run import compare as compare_methods
from keeplora.studies.principal import PrincipalConfig, analyze_principal

console = Console()
errors = Console(stderr=True)

DESCRIPTION = (
    "Teach a pre-trained vision-language model one new domain after another, without losing what it knew. Start with"
    " keeplora demo; keeplora COMMAND --help explains each command."
)

DEMO_METHODS = ("zero_shot", "lora_ft", "keeplora")

TRACEBACK = "KEEPLORA_TRACEBACK"
"""Set this variable to see where an error was raised."""


@dataclass(frozen=True, kw_only=True)
class RunFlags(RunConfig):
    """A run and the file its settings may come from; flags go before the file, the file before the benchmark's own."""

    config: Path | None = None
    """TOML file with any of these settings: the keys of a run at the top, [train] and [options] below."""
    continue_: Annotated[Path | None, tyro.conf.arg(name="continue")] = None
    """A finished run that takes the tasks of --benchmark behind its own, in its own directory and with its settings."""
    fork: Path | None = None
    """A run whose finished tasks are copied to --output; it goes on there, with its settings where none are given."""


def demo(output: Path = Path("runs/demo"), *, seed: int = 0) -> None:
    """Watch the embedded model learn the embedded tasks: untouched, by plain LoRA, and by KeepLoRA.

    Writes a run directory for each and a report with the three accuracy matrices.

    Args:
        output: Folder of the three runs and of report.html.
        seed: Seed of every random draw.
    """
    display = Display(console)
    with display.shown(), kept():
        runs = [
            run_stream(
                dataclasses.replace(run_defaults("mini", method, {}, "demo"), seed=seed, output=output / method),
                track=display.track,
                watch=display.watch,
            )
            for method in DEMO_METHODS
        ]
    for method, run_results in zip(DEMO_METHODS, runs, strict=True):
        console.print(matrix_table(run_results))
        show_capacity(output / method)
    write_atomically(output / "report.html", page(runs).encode())
    (output / "heat_maps.png").write_bytes(heat_maps(runs))
    console.print(f"Report: {escape(str(output / 'report.html'))}")


def run(flags: tyro.conf.OmitArgPrefixes[RunFlags]) -> None:
    """Learn a stream of tasks with a model and a method.

    Example: keeplora run --benchmark mini --model mini --method keeplora --seed 0 --output runs/mini
    Example: keeplora run --continue runs/birds --benchmark more_birds.toml
    Example: keeplora run --fork runs/birds --learning-rate 0.0003 --output runs/birds-slower

    Args:
        flags: The settings.
    """
    config = RunConfig(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(RunConfig)})
    if flags.continue_ is not None:
        config = with_more(flags.continue_, config)
    if flags.fork is not None and config.output == RunConfig.output:
        raise ValueError(f"--fork {flags.fork} needs a new run directory: give --output")
    display = Display(console)
    with display.shown():
        if flags.fork is not None and not (config.output / "run.json").exists():
            fork_run(flags.fork, config, track=display.track)
        results = run_stream(config, extend=flags.continue_ is not None, track=display.track, watch=display.watch)
    show_run(results, config.output)


def analyze(
    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[PrincipalConfig, tyro.conf.subcommand("principal")] | Annotated[None, tyro.conf.Suppress]
        ]
    ],
) -> None:
    """Look into a model without training it.

    Example: keeplora analyze principal --model mini --benchmark mini --output runs/principal

    Args:
        what: The analysis; keeplora analyze principal --help lists its settings.
    """
    assert what is not None, "a union needs a second member, but nobody can ask for it"
    display = Display(console)
    with display.shown():
        curve = analyze_principal(what, track=display.track)
    console.print(principal_table(curve))
    console.print(f"Curve: {escape(str(what.output / 'principal.png'))}, every task in principal.json")


def compare(flags: tyro.conf.OmitArgPrefixes[CompareConfig]) -> None:
    """Compare methods on equal terms: equal data, epochs and search, several seeds, means with intervals.

    Example: keeplora compare --benchmark mini --methods zero_shot,lora_ft,keeplora --seeds 5 --output runs/compare

    Args:
        flags: The settings.
    """
    display = Display(console)
    with display.shown():
        comparison = compare_methods(flags, track=display.track)
    for table in comparison_tables(comparison):
        console.print(table)
    for note in comparison.notes:
        console.print(escape(note), highlight=False)
    for folder, error in comparison.failures.items():
        console.print(f"[bold red]failed[/] {escape(folder)}: {escape(error)}")
    console.print(f"Report: {escape(str(flags.output / 'report.html'))}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "run": run,
    "compare": compare,
    "evaluate": evaluate,
    "resume": resume,
    "undo": undo,
    "export": export,
    "certify": certify,
    "analyze": analyze,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user did wrong ends with one message and a non-zero exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    silence_libraries()
    with _readable_errors():
        commands = dict(COMMANDS)
        if arguments[:1] == ["run"]:
            commands["run"] = _with_default(arguments[1:])
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="keeplora", description=DESCRIPTION)


def _with_default(arguments: list[str]) -> Any:
    """Return `run` with the defaults that the named method, benchmark and file, or the named run, give."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--method", "--benchmark", "--config", "--continue", "--fork"):
        parser.add_argument(name, nargs="?")
    named = vars(parser.parse_known_args(arguments)[0])
    if sum(named[name] is not None for name in ("config", "continue", "fork")) > 1:
        raise ValueError("give one of --config, --continue and --fork: each says where the other settings come from")
    if named["continue"] is not None and named["benchmark"] is None:
        raise ValueError(
            "--continue takes the new tasks from --benchmark FILE; to go on with a run that was cut off: keeplora"
            f" resume {named['continue']}"
        )
    if folder := named["continue"] or named["fork"]:
        config = config_of(read_run(Path(folder)))
        if named["method"] not in (None, config.method):
            raise ValueError(f"{folder} was learned by {config.method}, and goes on with it; leave out --method")
        config = dataclasses.replace(config, output=Path(folder) if named["continue"] else RunConfig.output)
    else:
        config = _defaults(named)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    places = {name: Path(named[name]) if named[name] else None for name in ("config", "continue", "fork")}
    default = RunFlags(**fields, config=places["config"], continue_=places["continue"], fork=places["fork"])

    def run_with_default(
        flags: Annotated[tyro.conf.OmitArgPrefixes[RunFlags], tyro.conf.arg(name="")] = default,
    ) -> None:
        run(flags)

    run_with_default.__doc__ = run.__doc__
    return run_with_default


def _defaults(named: dict[str, Any]) -> RunConfig:
    values = read_toml(Path(named["config"])) if named["config"] else {}
    for key in ("benchmark", "method"):
        values[key] = named[key] or values.get(key, getattr(RunConfig, key))
        if not isinstance(values[key], str):
            raise ValueError(f"{named['config']}: {key} = {values[key]!r} must be a name")
    benchmark, method = values.pop("benchmark"), values.pop("method")
    return run_defaults(benchmark, method, values, named["config"] or "the benchmark's defaults")


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        errors.print(f"[bold red]error:[/] {_escape(error)}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print(
            "[bold red]interrupted[/]; a run keeps what it has finished, and the same command goes on behind it"
        )
        sys.exit(130)


def _escape(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return escape(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    return escape(str(error))
