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

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.capacity import capacity_of, warn_of_full_layers
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.gradients import Track, silent
from keeplora.layers.module_state import device_of
from keeplora.methods.registry import Method, find_method
from keeplora.models.registry import StreamTask, family_of, locate
from keeplora.report.html import page
from keeplora.runs.config import RunConfig, open_stream, plain_values
from keeplora.runs.directory import Ledger
from keeplora.runs.open import open_ledger
from keeplora.runs.phases import Unfinished
from keeplora.task import LearningError
from keeplora.training.profiling import Phases, measured
from keeplora.training.state_file import digest_of
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
    with open_ledger(config.output, values, list(values["tasks"]), extend=extend) as ledger:
        if ledger.num_finished < len(values["tasks"]):
            learn(config, ledger, track, watch)
        return report(ledger)


def report(ledger: Ledger) -> Results:
    """Write the report of a run that is complete, unless it is there; return the scores."""
    results = ledger.results()
    if "report.html" not in ledger.files:
        ledger.write("report.html", page([results], capacity_of(ledger.tasks)).encode())
        ledger.commit()
    return results


def learn(config: RunConfig, ledger: Ledger, track: Track, watch: Watch) -> None:
    """Learn, one after another, the tasks that the ledger does not have yet."""
    model, tasks = open_stream(config, track)
    method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
    lessons = method.plan(tasks)
    model = catch_up(model, method, tasks, config, ledger, track)
    watch(ledger.results())
    for index in range(ledger.num_finished, len(tasks)):
        task, lesson = tasks[index], lessons[index]
        seed_everything(config.seed + 1000 * index)
        now = Unfinished(ledger, task.name, device_of(model), lesson.generators())
        method.once = now.once
        with forgotten_if_it_cannot_be_learned(now):
            with now.clock.phase("initialise"):
                adapted = method.before_task(model, lesson)
            trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
            places = now.checkpoints(config.checkpoint_steps, 60 * config.checkpoint_minutes)
            settings = dataclasses.replace(config.train, epochs=task.epochs or config.train.epochs)
            with now.clock.phase("train"):
                watched = method.lesson(adapted, lesson, settings.epochs)
                losses = fit(adapted, watched, settings, penalty=method.penalty, track=track, checkpoints=places)
            with now.clock.phase("merge"):
                model = method.after_task(adapted, lesson)
            scores = evaluate_once(model, tasks, method, ledger, now, track)
        details = {"name": task.name, "scores": scores, "losses": losses, "phases": now.phases()}
        details["parameters"] = {"trained": trained, "added": method.record.added_parameters}
        changed = (method.record.adapter is not None and method.record.merged) or index == 0
        saves = changed and config.save_model
        save = partial(family_of(config.model).save, model, locate(config.model)) if saves else None
        ledger.add_task(method.record, details, save)
        warn_of_full_layers(ledger.tasks, len(tasks) - ledger.num_finished)
        watch(ledger.results())


def catch_up(
    model: nn.Module, method: Method, tasks: list[StreamTask], config: RunConfig, ledger: Ledger, track: Track
) -> nn.Module:
    """Bring the untouched model and the method to where the ledger is; return the model.

    What was never evaluated is evaluated on the way: the untouched model, and each state on tasks that came later.

    Raises:
        ValueError: If the model is not the one that the run began with, or a file is missing or damaged.
    """
    if "zero_shot" not in ledger.manifest:
        phases: Phases = {}
        with measured(phases, "zero_shot"):
            scores = evaluate(model, tasks, track=track)
        ledger.start(digest_of(model.named_parameters()), scores, phases)
    require_same_model(model, config, ledger)
    late = tasks[len(ledger.manifest["tasks"]) :]
    columns = [evaluate(model, late, track=track)]
    for index in range(ledger.num_finished):
        model = replay(method, model, tasks[index], ledger, index)
        columns.append(evaluate(model, late, track=track))
    if late:
        ledger.widen(plain_values(config), [task.name for task in tasks], columns)
    return model


def require_same_model(model: nn.Module, config: RunConfig, ledger: Ledger) -> None:
    """Check that a model has the weights that the run began with.

    Raises:
        ValueError: If it has others.
    """
    if digest_of(model.named_parameters()) != ledger.manifest["model_digest"]:
        raise ValueError(
            f"model {config.model!r} has other weights than when {ledger.folder} was begun; get them back, or give"
            " another --output"
        )


def replay(method: Method, model: nn.Module, task: StreamTask, ledger: Ledger, index: int) -> nn.Module:
    """Redo a finished task from the ledger's files instead of learning it again."""
    record, folder = ledger.record(index)
    if record.head:
        task.load_head(record.head)
    return method.replay(model, record, folder)


def evaluate_once(
    model: nn.Module, tasks: list[StreamTask], method: Method, ledger: Ledger, now: Unfinished, track: Track
) -> list[float]:
    """Return the model's scores on every task; those of before if the method left it as it was."""
    if method.record.adapter is None:
        return list(ledger.tasks[-1]["scores"] if ledger.tasks else ledger.manifest["zero_shot"])
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
