"""The commands that learn, compare and analyse. Each is a typed function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from keeplora.cli.flags import flag, resolve_flags, run_flags, sourced
from keeplora.cli.progress import Display
from keeplora.cli.runs import show_capacity, show_run
from keeplora.cli.tables import comparison_tables, matrix_table, principal_table, settings_table
from keeplora.config import read_toml
from keeplora.data.cache import kept
from keeplora.report.charts import heat_maps
from keeplora.report.html import page
from keeplora.runs.atomic_store import write_atomically
from keeplora.runs.branch import fork as fork_run
from keeplora.runs.branch import with_more
from keeplora.runs.config import RunConfig, Sourced, resolve, settle
from keeplora.runs.loop import run as run_stream
from keeplora.runs.open import read_run, settings_of_run
from keeplora.studies.compare.config import CompareConfig
from keeplora.studies.compare.run import compare as compare_methods
from keeplora.studies.principal import PrincipalConfig, analyze_principal

console = Console()

DEMO_METHODS = ("zero_shot", "lora_ft", "keeplora")


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
                resolve(("keeplora demo", {"method": method, "seed": seed, "output": output / method})),
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


def run(settings: Any, train: Any, method: Any) -> None:
    """Learn a stream of tasks with a model and a method.

    Example: keeplora run --benchmark mini --model mini --method keeplora --seed 0 --output runs/mini

    Example: keeplora run --continue runs/birds --benchmark more_birds.toml

    Example: keeplora run --fork runs/birds --learning-rate 0.0003 --output runs/birds-slower

    Example: keeplora run --config settings.toml --show-settings

    A flag goes before the file, the file before what the benchmark sets, that before the library's own defaults, which
    are those shown here. --show-settings tells what a run would use, and where each value comes from.

    Args:
        settings: What to learn, and where to write it.
        train: How each task is optimised.
        method: The method's own options; those of another method are an error.
    """
    given = dict(settings)
    config_file, continued, fork = (given.pop(name, None) for name in ("config", "continue", "fork"))
    is_shown = given.pop("show_settings", False)
    if sum(one is not None for one in (config_file, continued, fork)) > 1:
        raise ValueError("give one of --config, --continue and --fork: each says where the other settings come from")
    groups = {"settings": given, "train": train, "options": method}
    if continued is not None:
        config = _continued(continued, **groups)
    elif fork is not None:
        config = settle([*sourced(**groups), _of_run(fork, given, output=RunConfig.output)])
        if config.output == RunConfig.output:
            raise ValueError(f"--fork {fork} needs a new run directory: give --output")
    else:
        config = resolve_flags((str(config_file), read_toml(config_file)) if config_file else None, **groups)
    if is_shown:
        console.print(settings_table(config))
        return
    display = Display(console)
    with display.shown():
        if fork is not None and not (config.output / "run.json").exists():
            fork_run(fork, config, track=display.track)
        results = run_stream(config, extend=continued is not None, track=display.track, watch=display.watch)
    show_run(results, config.output)


run.__annotations__ |= run_flags(
    {
        "config": flag(
            Path, "TOML file with any of these settings: the keys of a run at the top, [train] and [options]."
        ),
        "continue": flag(
            Path, "A finished run that takes the tasks of --benchmark after its own, in its own directory."
        ),
        "fork": flag(Path, "A run whose finished tasks are copied to --output; it continues there, with its settings."),
        "show_settings": flag(bool, "Show each setting and where it comes from; learn and write nothing."),
    }
)


def _of_run(folder: Path, given: Mapping[str, Any], **changed: Any) -> Sourced:
    """Return the settings of a run as a table, for one that goes on with them."""
    source, values = settings_of_run(read_run(folder))
    if given.get("method", values["method"]) != values["method"]:
        raise ValueError(f"{folder} was learned by {values['method']}, and goes on with it; leave out --method")
    return source, {**values, **changed}


def _continued(folder: Path, **groups: Any) -> RunConfig:
    """Return the settings of a finished run that takes more tasks."""
    if "benchmark" not in groups["settings"]:
        raise ValueError(
            "--continue takes the new tasks from --benchmark FILE; to resume a run that was cut off: keeplora resume"
            f" {folder}"
        )
    return with_more(folder, settle([*sourced(**groups), _of_run(folder, groups["settings"], output=folder)]))


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
    """Compare methods on equal terms: equal data, epochs and search, several seeds, intervals.

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
