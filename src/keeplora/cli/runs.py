"""The commands that work on a run directory. Each is a typed function."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markup import escape

from keeplora.cli.progress import Display
from keeplora.cli.tables import capacity_lines, evaluation_table, export_lines, matrix_table, probe_lines, proof_lines
from keeplora.errors import counted
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.capacity import capacity_of
from keeplora.evaluation.evaluate import evaluate as evaluate_model
from keeplora.runs.atomic_store import write_json
from keeplora.runs.branch import undo as undo_task
from keeplora.runs.export import ExportConfig, export_run
from keeplora.runs.exported import is_export, reopen_export
from keeplora.runs.loop import run as run_stream
from keeplora.runs.open import Places, config_of, read_run, reopen
from keeplora.runs.verify import certify as certify_run

console = Console()


def evaluate(
    run: tyro.conf.Positional[Path],
    *,
    split: Literal["test", "validation"] | None = None,
    benchmark: Path | None = None,
    data: Path | None = None,
) -> None:
    """Evaluate the model of a run, or an exported one, on all tasks, and compare with what was recorded."""
    with Display(console) as display:
        if is_export(run):
            told, config, model, tasks = reopen_export(
                run, split=split, places=Places(benchmark, data), track=display.track
            )
            title, recorded, before = f"{config.method}, exported ({told.format})", config.evaluation, told.scores
        else:
            directory, model, tasks = reopen(run, split=split, places=Places(benchmark, data), track=display.track)
            results, recorded = directory.results(), directory.manifest["config"]["evaluation"]
            title, before = f"{results.method}, {counted(len(results.accuracy), 'task')} learned", results.accuracy[-1]
        scores = evaluate_model(model, tasks, track=display.track)
    names = [task.name for task in tasks]
    console.print(evaluation_table(title, names, (recorded, before), (split or recorded, scores)))


def export(run: tyro.conf.Positional[Path], flags: tyro.conf.OmitArgPrefixes[ExportConfig]) -> None:
    """Write what a run learned as a folder that works without keeplora, with a model card."""
    with Display(console) as display:
        card = export_run(run, flags, track=display.track)
    for line in export_lines(card, flags.output):
        console.print(line, highlight=False, soft_wrap=True)


def certify(run: tyro.conf.Positional[Path], *, layers: bool = False, json: Path | None = None) -> None:
    """Check a run directory against its own files: hashes, certificates, merged model."""
    if json is not None and (json.is_dir() or run.resolve() in json.resolve().parents):
        raise ValueError(f"{json} is a folder or inside the run, which stays as it is; give --json another file")
    with Display(console) as display:
        proof = certify_run(run, track=display.track)
    if json is not None:
        write_json(json, proof.to_json())
    for line in proof_lines(proof, layers=layers):
        console.print(line, highlight=False)
    if proof.breaches:
        sys.exit(1)


def resume(
    run: tyro.conf.Positional[Path],
    *,
    benchmark: Path | None = None,
    data: Path | None = None,
    checkpoint_steps: int | None = None,
    checkpoint_minutes: float = 5.0,
) -> None:
    """Resume a run after its last completed phase or checkpoint; a complete one is shown."""
    directory = read_run(run)
    config = config_of(directory, Places(benchmark, data))
    if directory.is_complete and "report.html" in directory.files:  # On a read-only medium too.
        show_run(directory.results(), run)
        return
    config = replace(config, checkpoint_steps=checkpoint_steps, checkpoint_minutes=checkpoint_minutes)
    with Display(console) as display:
        results = run_stream(config, track=display.track, watch=display.watch)
    show_run(results, run)


def undo(
    run: tyro.conf.Positional[Path],
    task: tyro.conf.Positional[str],
    *,
    output: Path,
    benchmark: Path | None = None,
    data: Path | None = None,
) -> None:
    """Write a run directory that is another one without one of its tasks."""
    with Display(console) as display:
        results = undo_task(run, task, output, places=Places(benchmark, data), track=display.track)
    console.print(f"Undone: {escape(task)}")
    show_run(results, output)
    if left := ", ".join(results.tasks[len(results.accuracy) :]):
        console.print(f"Not finished: {escape(left)}; resume it: keeplora resume {escape(str(output))}")


def show_run(results: Results, folder: Path) -> None:
    """Print the scores of a run, the remaining capacity of its layers, and where it is."""
    show_scores(results, folder)
    processes = read_run(folder).manifest.get("processes", 1)
    shared = f" ({processes} processes took part)" if processes > 1 else ""
    console.print(f"Run directory: {escape(str(folder))}{shared}")


def show_scores(results: Results, folder: Path) -> None:
    """Print the scores of a run, and the remaining capacity of its layers if its method protects something."""
    console.print(matrix_table(results))
    for text in probe_lines(results):
        console.print(text, highlight=False)
    for line in capacity_lines(capacity_of(read_run(folder).tasks)):
        console.print(line, highlight=False)
