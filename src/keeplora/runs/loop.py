"""The continual loop: a model learns a stream of tasks by a method, and every task is evaluated after each.

Every task is a sequence of durable phases: gradient, initialise, train, merge, features, evaluate, record. A run
that was cut off goes on behind the last one that is in its run directory, and ends as if it had not been.
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
from keeplora.methods.base import Method
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.report.html import page
from keeplora.runs.config import RunConfig, open_stream, plain_values
from keeplora.runs.directory import RunDirectory
from keeplora.runs.open import open_run
from keeplora.runs.phases import Unfinished
from keeplora.training.profiling import Phases, measured
from keeplora.training.trainer import best_device, fit, seed_everything

Watch = Callable[[Results], None]
"""Called with the results so far: at the start, and after each task."""


def run(
    config: RunConfig, *, extend: bool = False, track: Track = silent, watch: Watch = lambda results: None
) -> Results:
    """Learn a stream of tasks and return the scores; everything is written to `config.output` as it goes.

    Args:
        config: What to learn, and where to write it. A run that is there and was cut off goes on.
        extend: Whether a run that is there may be one of fewer tasks, the first ones of this stream.
        track: Shows progress.
        watch: Called with the results so far.

    Raises:
        ValueError: If something of the configuration or the data is wrong, or training diverges; the tasks that were
            finished before stay in the run directory.
    """
    best_device()  # Processes must have met before the run directory is opened: only the first one writes to it.
    values = plain_values(config)
    with open_run(config.output, values, list(values["tasks"]), extend=extend) as directory:
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
    """Learn, one after another, the tasks that the directory does not have yet."""
    model, tasks = open_stream(config, track)
    method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
    scheduled = method.schedule(tasks)
    model = catch_up(model, method, tasks, config, directory, track)
    watch(directory.results())
    for index in range(directory.num_finished, len(tasks)):
        task, training_task = tasks[index], scheduled[index]
        seed_everything(config.seed + 1000 * index)
        now = Unfinished(directory, task.name, device_of(model), training_task.generators())
        method.once = now.once
        with forgotten_if_it_cannot_be_learned(now):
            with now.clock.phase("initialise"):
                adapted = method.before_task(model, training_task)
            trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
            places = now.checkpoints(config.checkpoint_steps, 60 * config.checkpoint_minutes)
            settings = dataclasses.replace(config.train, epochs=task.epochs or config.train.epochs)
            with now.clock.phase("train"):
                watched = method.training_task(adapted, training_task, settings.epochs)
                losses = fit(adapted, watched, settings, penalty=method.penalty, track=track, checkpoints=places)
            with now.clock.phase("merge"):
                model = method.after_task(adapted, training_task)
            scores = evaluate_once(model, tasks, method, directory, now, track)
        details = {"name": task.name, "scores": scores, "losses": losses, "phases": now.phases()}
        details["parameters"] = {"trained": trained, "added": method.record.added_parameters}
        changed = (method.record.adapter is not None and method.record.merged) or index == 0
        saves = changed and config.save_model
        save = partial(family_of(config.model).save, model, locate(config.model)) if saves else None
        directory.add_task(method.record, details, save)
        warn_of_full_layers(directory.tasks, len(tasks) - directory.num_finished)
        watch(directory.results())


def catch_up(
    model: nn.Module, method: Method, tasks: list[StreamTask], config: RunConfig, directory: RunDirectory, track: Track
) -> nn.Module:
    """Bring the untouched model and the method to where the directory is; return the model.

    What was never evaluated is evaluated on the way: the untouched model, and each state on tasks that came later.

    Raises:
        ValueError: If the model is not the one that the run began with, or a file is missing or damaged.
    """
    if "zero_shot" not in directory.manifest:
        phases: Phases = {}
        with measured(phases, "zero_shot"):
            scores = evaluate(model, tasks, track=track)
        directory.start(digest_of(model.named_parameters()), scores, phases)
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
    """Redo a finished task from the directory's files instead of learning it again."""
    record, folder = directory.record(index)
    if record.head:
        task.load_head(record.head)
    return method.replay(model, record, folder)


def evaluate_once(
    model: nn.Module, tasks: list[StreamTask], method: Method, directory: RunDirectory, now: Unfinished, track: Track
) -> list[float]:
    """Return the model's scores on every task; those of before if the method left it as it was."""
    if method.record.adapter is None:
        return list(directory.tasks[-1]["scores"] if directory.tasks else directory.manifest["zero_shot"])
    found = now.once(
        "evaluate", lambda: {"scores": torch.tensor(evaluate(model, tasks, track=track), dtype=torch.float64)}
    )
    return found["scores"].tolist()


@contextmanager
def forgotten_if_it_cannot_be_learned(now: Unfinished) -> Iterator[None]:
    """Drop what a task has finished so far when it fails: another attempt with these settings would fail again."""
    try:
        yield
    except LearningError:
        now.forget()
        raise
