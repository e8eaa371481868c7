"""The commands that learn, compare and analyse. Each is a typed function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from keeplora.cli.flags import flag, run_flags, sourced
from keeplora.cli.progress import Display
from keeplora.cli.runs import show_run, show_scores
from keeplora.cli.tables import comparison_tables, principal_table, settings_table
from keeplora.data.cache import kept
from keeplora.report.charts import heat_maps
from keeplora.report.html import page
from keeplora.runs.answers import answered
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
DEMOS = {"images": "mini", "vqa": "mini_vqa"}  # The embedded model and benchmark of each kind.


def demo(output: Path = Path("runs/demo"), *, kind: Literal["images", "vqa"] = "images", seed: int = 0) -> None:
    """Watch the embedded model learn the embedded tasks: untouched, by plain LoRA, and by KeepLoRA."""
    runs, folder = {}, output / kind
    shared = {"model": DEMOS[kind], "benchmark": DEMOS[kind], "seed": seed}
    with Display(console) as display, kept():
        for method in DEMO_METHODS:
            config = resolve(("keeplora demo", {**shared, "method": method, "output": folder / method}))
            runs[method] = run_stream(config, track=display.track, watch=display.watch)
    for method, results in runs.items():
        show_scores(results, folder / method)
    questions = answered([read_run(folder / method) for method in DEMO_METHODS[1:]])
    write_atomically(folder / "report.html", page(list(runs.values()), answers=questions).encode())
    (folder / "heat_maps.png").write_bytes(heat_maps(list(runs.values())))
    console.print(f"Report: {escape(str(folder / 'report.html'))}")


def run(settings: Any, train: Any, method: Any, ablations: Any, others: Any) -> None:
    """Learn a stream of tasks with a model and a method."""
    given = dict(settings)
    continued, fork = given.pop("continue", None), given.pop("fork", None)
    is_shown = given.pop("show_settings", False)
    if sum(source is not None for source in (given.get("config"), continued, fork)) > 1:
        raise ValueError("give one of --config, --continue and --fork: each says where the other settings come from")
    tables = sourced(given, train, {**method, **ablations, **others})
    if continued is not None:
        if "benchmark" not in given:
            cure = f"to resume a run that was cut off: keeplora resume {continued}"
            raise ValueError(f"--continue takes the new tasks from --benchmark FILE; {cure}")
        config = with_more(continued, settle([*tables, _of_run(continued, given, output=continued)]))
    elif fork is not None:
        source, own = _of_run(fork, given, output=RunConfig.output)
        if "more" in given:  # After those that the run has.
            tables = [("--more", {"more": [*own["more"], *given["more"]]}), *tables]
        config = settle([*tables, (source, own)])
        if config.output == RunConfig.output:
            raise ValueError(f"--fork {fork} needs a new run directory: give --output")
    else:
        config = resolve(*tables)
    if is_shown:
        console.print(settings_table(config))
        return
    with Display(console) as display:
        if fork is not None and not (config.output / "run.json").exists():
            fork_run(fork, config, track=display.track)
        results = run_stream(config, extend=continued is not None, track=display.track, watch=display.watch)
    show_run(results, config.output)


run.__annotations__ |= run_flags(
    config=flag(
        Path,
        "TOML file with any of these settings: the keys of a run at the top, [train] and [options]. Paths in it are"
        " relative to where you are.",
    ),
    **{"continue": flag(Path, "A finished run that takes the tasks of --benchmark after its own, in its directory.")},
    fork=flag(
        Path,
        "A run whose finished tasks are copied to --output; what is left of its tasks, and of --more, is learned there,"
        " with its settings where no others are given.",
    ),
    show_settings=flag(bool, "Show each setting and where it comes from; learn and write nothing."),
)


def _of_run(folder: Path, given: Mapping[str, Any], *, output: Path) -> Sourced:
    """Return the settings of a run as a table, for one that resumes with them."""
    source, values = settings_of_run(read_run(folder))
    if given.get("method", values["method"]) != values["method"]:
        raise ValueError(f"{folder} was learned by {values['method']}, and continues with it; leave out --method")
    return source, {**values, "output": output}


def analyze(
    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[PrincipalConfig, tyro.conf.subcommand("principal")] | Annotated[None, tyro.conf.Suppress]
        ]
    ],
) -> None:
    """Look into a model without training it."""
    assert what is not None, "a union needs a second member, but nobody can ask for it"
    with Display(console) as display:
        curve = analyze_principal(what, track=display.track)
    console.print(principal_table(curve))
    console.print(f"Curve: {escape(str(what.output / 'principal.png'))}, every task in principal.json")


def compare(flags: tyro.conf.OmitArgPrefixes[CompareConfig]) -> None:
    """Compare methods on equal terms: equal data, epochs and search, several seeds, intervals."""
    with Display(console) as display:
        comparison = compare_methods(flags, track=display.track)
    for table in comparison_tables(comparison):
        console.print(table)
    for note in comparison.notes:
        console.print(escape(note), highlight=False)
    for folder, error in comparison.failures.items():
        console.print(f"[bold red]failed[/] {escape(folder)}: {escape(error)}")
    console.print(f"Report: {escape(str(flags.output / 'report.html'))}")
