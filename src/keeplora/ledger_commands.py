"""The subcommands that work on a run directory. Each is a typed function, as in `cli`."""

from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markup import escape

from keeplora.display import Display, evaluation_table, export_lines
from keeplora.evaluate import evaluate as evaluate_model
from keeplora.export import ExportConfig, export_run
from keeplora.reopen import reopen

console = Console()


def evaluate(run: tyro.conf.Positional[Path], *, split: Literal["test", "validation"] | None = None) -> None:
    """Evaluate the model of a run directory on all tasks of its benchmark, and compare with what the run recorded.

    Args:
        run: The run directory.
        split: The examples to evaluate on; the run's own if not given.
    """
    display = Display(console)
    with display.shown():
        ledger, model, tasks = reopen(run, split=split, track=display.track)
        scores = evaluate_model(model, tasks, track=display.track)
    recorded = ledger.manifest["config"]["evaluation"]
    console.print(evaluation_table(ledger.results(), recorded, scores, split or recorded))


def export(run: tyro.conf.Positional[Path], flags: tyro.conf.OmitArgPrefixes[ExportConfig]) -> None:
    """Write what a run learned as a folder that works without keeplora, with a model card.

    Example: keeplora export runs/mini --format merged --output exports/mini
    Example: keeplora export runs/mini --format adapter --rank 32 --dtype bfloat16 --output exports/mini-lora

    Args:
        run: The run directory.
        flags: The settings.
    """
    display = Display(console)
    with display.shown():
        card = export_run(run, flags, track=display.track)
    for line in export_lines(card, flags.output):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Card: {escape(str(flags.output / 'README.md'))}")
