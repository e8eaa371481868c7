"""The subcommands that work on a run directory. Each is a typed function, as in `cli`."""

from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from keeplora.display import Display, evaluation_table
from keeplora.evaluate import evaluate as evaluate_model
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
