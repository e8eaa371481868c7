"""The continual loop: a model learns a stream of tasks by a method, and every task is evaluated after each.

Every task is a sequence of durable phases: gradient, initialise, train, merge, features, evaluate. A run that was cut
off resumes after the last completed one, and gives the same bytes as an uninterrupted run.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from keeplora.errors import LearningError
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.capacity import capacity_of, warn_of_full_layers
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.module_state import device_of
from keeplora.layers.weights import digest_of
from keeplora.methods.base import Method, Step
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.report.html import page
from keeplora.runs.config import RunConfig, plain_values
from keeplora.runs.directory import RunDirectory
from keeplora.runs.open import open_run, open_stream
from keeplora.runs.phases import TaskPhases
from keeplora.training.profiling import Costs, measured
from keeplora.training.trainer import best_device, fit, seed_everything

Watch = Callable[[Results], None]
"""Called with the results so far: at the start, and after each task."""


def run(
    config: RunConfig, *, extend: bool = False, track: Track = silent, watch: Watch = lambda results: None
) -> Results:
    """Learn a stream of tasks and return the scores; everything is written to `config.output` as it goes.

    Args:
        config: What to learn, and where to write it. A run that is there and was cut off is resumed.
        extend: Whether a run that is there may be one of fewer tasks, the first ones of this stream.
        track: Shows progress.
        watch: Called with the results so far.

    Raises:
        ValueError: If something of the configuration or the data is wrong, or training diverges; the tasks that were
            finished before stay in the run directory.
    """
    best_device()  # Processes must have met before the run directory is opened: only the first one writes to it.
    values = plain_values(config)
    with open_run(config.output, values, list(values["tasks"]), sources=config.all_sources, extend=extend) as directory:
        if directory.num_finished < len(values["tasks"]):
            learn(config, directory, track, watch)
        return report(directory)


def report(directory: RunDirectory) -> Results:
    """Write the report of a run that is complete, unless it is there; return the scores."""
    results = directory.results()
    if "report.html" not in directory.files:
        directory.write("report.html", page([results], capacity_of(directory.tasks)).encode())
        directory.commit()
    return results


def learn(config: RunConfig, directory: RunDirectory, track: Track, watch: Watch) -> None:
    """Learn, one after another, the tasks that the run directory does not have yet."""
    model, tasks = open_stream(config, track)
    method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
    scheduled = method.schedule(tasks)
    model = catch_up(model, method, tasks, config, directory, track)
    watch(directory.results())
    for index in range(directory.num_finished, len(tasks)):
        task, training_task = tasks[index], scheduled[index]
        seed_everything(config.seed + 1000 * index)
        phases = TaskPhases(directory, task.name, device_of(model), training_task.generators())
        phases.wrap(method)
        train = dataclasses.replace(config.train, epochs=task.epochs or config.train.epochs)
        with dropped_if_it_cannot_be_learned(phases):
            with phases.clock.phase("initialise"):
                adapted = method.before_task(model, training_task)
            num_trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
            checkpoints = phases.checkpoints(config.checkpoint_steps, 60 * config.checkpoint_minutes)
            with phases.clock.phase("train"):
                watched = method.training_task(adapted, training_task, train.epochs)
                losses = fit(adapted, watched, train, penalty=method.penalty, track=track, checkpoints=checkpoints)
            with phases.clock.phase("merge"):
                model = method.after_task(adapted, training_task)
            scores = evaluate_once(model, tasks, method, directory, phases, track)
        details = {"name": task.name, "scores": scores, "losses": losses, "phases": phases.costs()}
        details["parameters"] = {"trained": num_trained, "added": method.record.added_parameters}
        changed = (method.record.adapter is not None and method.record.merged) or index == 0
        save = partial(family_of(config.model).save, model, locate(config.model))
        directory.add_task(method.record, details, save if changed and config.save_model else None)
        warn_of_full_layers(directory.tasks, len(tasks) - directory.num_finished)
        watch(directory.results())


def catch_up(
    model: nn.Module, method: Method, tasks: list[StreamTask], config: RunConfig, directory: RunDirectory, track: Track
) -> nn.Module:
    """Bring the untouched model and the method to where the run directory is; return the model.

    What was never evaluated is evaluated on the way: the untouched model, and each state on tasks that came later.

    Raises:
        ValueError: If the model is not the one that the run began with, or a file is missing or damaged.
    """
    if "zero_shot" not in directory.manifest:
        costs: Costs = {}
        with measured(costs, "zero_shot"):
            scores = evaluate(model, tasks, track=track)
        directory.start(digest_of(model.named_parameters()), scores, costs)
    require_same_model(model, config, directory)
    late = tasks[len(directory.manifest["tasks"]) :]
    columns = [evaluate(model, late, track=track)]
    for index in range(directory.num_finished):
        model = replay(method, model, tasks[index], directory, index)
        columns.append(evaluate(model, late, track=track))
    if late:
        directory.widen(plain_values(config), [task.name for task in tasks], columns)
    return model


def require_same_model(model: nn.Module, config: RunConfig, directory: RunDirectory) -> None:
    """Check that a model has the weights that the run began with.

    Raises:
        ValueError: If it has others.
    """
    if digest_of(model.named_parameters()) != directory.manifest["model_digest"]:
        raise ValueError(
            f"model {config.model!r} has other weights than when {directory.folder} was begun; get them back, or give"
            " another --output"
        )


def replay(method: Method, model: nn.Module, task: StreamTask, directory: RunDirectory, index: int) -> nn.Module:
    """Redo a finished task from the files of a run instead of learning it again."""
    record, folder = directory.record(index)
    if record.head:
        task.load_head(record.head)
    return method.replay(model, record, folder)


def evaluate_once(
    model: nn.Module,
    tasks: list[StreamTask],
    method: Method,
    directory: RunDirectory,
    phases: TaskPhases,
    track: Track,
) -> list[float]:
    """Return the model's scores on every task; those of before if the method left it as it was."""
    if method.record.adapter is None:
        return list(directory.tasks[-1]["scores"] if directory.tasks else directory.manifest["zero_shot"])
    scores = phases.once(
        Step("evaluate"), lambda: {"scores": torch.tensor(evaluate(model, tasks, track=track), dtype=torch.float64)}
    )
    return list(scores["scores"].tolist())


@contextmanager
def dropped_if_it_cannot_be_learned(phases: TaskPhases) -> Iterator[None]:
    """Drop what a task has finished so far when it fails: another attempt with these settings would fail again."""
    try:
        yield
    except LearningError:
        phases.drop()
        raise
