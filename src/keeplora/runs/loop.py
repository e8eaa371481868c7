"""The continual loop: a model learns a stream of tasks by a method, and every task is evaluated after each.

Every task is a sequence of durable phases: gradient, initialise, train, merge, features, evaluate. A run that was cut
off resumes after the last completed one, and gives the same bytes as an uninterrupted run.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.capacity import capacity_of, warn_of_full_layers
from keeplora.layers.module_state import device_of
from keeplora.layers.weights import digest_of
from keeplora.methods.base import Method, Step, TaskRecord
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track, silent
from keeplora.report.html import page
from keeplora.runs.answers import answered, evaluated, write_untouched
from keeplora.runs.config import RunConfig, plain_values
from keeplora.runs.directory import RunDirectory
from keeplora.runs.open import open_probes, open_run, open_stream, require_same_data
from keeplora.runs.phases import TaskPhases
from keeplora.training.profiling import Clock
from keeplora.training.trainer import best_device, fit, seed_everything

HARDLY = 1.0  # A task that gains fewer points, and is not at NEARLY_ALL before, was hardly learned.
NEARLY_ALL = 95.0

logger = logging.getLogger(__name__)

Watch = Callable[[Results], None]  # Called with the results so far: at the start, and after each task.


def run(
    config: RunConfig, *, extend: bool = False, track: Track = silent, watch: Watch = lambda results: None
) -> Results:
    """Learn a stream of tasks and return the scores; everything is written to `config.output` as it goes.

    A run that is there is resumed; with `extend`, it may be one of fewer tasks, the first ones of this stream. `track`
    shows progress, `watch` is called with the results so far. What is wrong with the configuration or the data, or
    training that diverges, is a ValueError; the tasks that were finished before stay in the run directory.
    """
    best_device()  # Processes must have met before the run directory is opened: only the first one writes to it.
    values = plain_values(config)
    with open_run(config.output, values, list(values["tasks"]), settings=config.settings, extend=extend) as directory:
        if directory.num_finished < len(values["tasks"]):
            learn(config, directory, track, watch)
        return report(directory)


def report(directory: RunDirectory) -> Results:
    """Write the report of a run that is complete, unless it is there; return the scores."""
    results = directory.results()
    if "report.html" not in directory.files:
        text = page([results], capacity_of(directory.tasks), answered([directory]))
        directory.write("report.html", text.encode())
        directory.commit()
    return results


def learn(config: RunConfig, directory: RunDirectory, track: Track, watch: Watch) -> None:
    """Learn, one after another, the tasks that the run directory does not have yet."""
    model, tasks = open_stream(config, track)
    method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
    scheduled = method.schedule(tasks)
    probes = open_probes(config, track)
    model = catch_up(model, method, (tasks, probes), config, directory, track)
    watch(results := directory.results())
    for index in range(directory.num_finished, len(tasks)):
        task, training_task = tasks[index], scheduled[index]
        seed_everything(config.seed + 1000 * index)
        train = replace(config.train, epochs=task.epochs or config.train.epochs)
        with TaskPhases(directory, method, task.name, device_of(model), training_task.generators()) as phases:
            with phases.clock.phase("initialise"):
                adapted = method.before_task(model, training_task)
            num_trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
            checkpoints = phases.checkpoints(config.checkpoint_steps, 60 * config.checkpoint_minutes)
            with phases.clock.phase("train"):
                watched = method.training_task(adapted, training_task, train.epochs)
                losses = fit(adapted, watched, train, penalty=method.penalty, track=track, checkpoints=checkpoints)
            with phases.clock.phase("merge"):
                model = method.after_task(adapted, training_task)
            scores = before = [results.zero_shot, *results.accuracy][-1]
            probed = [scores[-1] for scores in results.probes.values()]
            if is_changed := method.record.adapter is not None:  # Otherwise the model is as it was before the task.
                found = phases.once(Step("evaluate"), _scores, model, [*tasks, *probes], track)
                scores, probed = (part.tolist() for part in found["scores"].split([len(tasks), len(probes)]))
                directory.write_predictions(bytes(found["predictions"].tolist()), index)
        details = {"name": task.name, "scores": scores, "losses": losses, "phases": phases.clock.read()}
        if probes:
            details["probes"] = dict(zip(results.probes, probed, strict=True))
        details["parameters"] = {"trained": num_trained, "added": method.record.added_parameters}
        is_new = index == 0 or (is_changed and method.record.merged)
        is_saved = config.save_model and is_new and not config.keeps_beside
        directory.add_task(method.record, details, model if is_saved else None)
        warn_of_full_layers(directory.tasks, len(tasks) - directory.num_finished)
        if is_changed and method.one_by_one and scores[index] < min(before[index] + HARDLY, NEARLY_ALL):
            gain = scores[index] - before[index]
            logger.warning("task %r hardly moved (%+.1f points): raise learning_rate or epochs", task.name, gain)
        watch(results := directory.results())


def catch_up(
    model: nn.Module,
    method: Method,
    streams: tuple[list[StreamTask], list[StreamTask]],
    config: RunConfig,
    directory: RunDirectory,
    track: Track,
) -> nn.Module:
    """Bring the untouched model and the method to where the run is, evaluate what never was, and return the model.

    `streams` are the tasks and the probes.
    """
    tasks, probes = streams
    if "zero_shot" not in directory.manifest:
        clock = Clock()
        with clock.phase("zero_shot"):
            scores, told = evaluated(model, [*tasks, *probes], track)
        probed = dict(zip([probe.name for probe in probes], scores[len(tasks) :], strict=True))
        write_untouched(directory, tasks, told)
        directory.start(digest_of(model.named_parameters()), scores[: len(tasks)], clock.read(), probed)
    require_same_model(model, config, directory)
    require_same_data(directory, tasks)
    directory.manifest["data"] = {task.name: dict(task.data) for task in tasks if task.data}
    late = tasks[len(directory.manifest["tasks"]) :]
    scores, told = evaluated(model, late, track)
    columns = [scores]
    if late:
        write_untouched(directory, tasks, directory.predictions() + told)
    for index in range(directory.num_finished):
        model = replay(method, model, tasks[index], *directory.record(index))
        scores, told = evaluated(model, late, track)
        columns.append(scores)
        if late:
            directory.write_predictions(directory.predictions(index) + told, index)
    if late:
        directory.widen(plain_values(config), [task.name for task in tasks], columns)
    return model


def require_same_model(model: nn.Module, config: RunConfig, directory: RunDirectory) -> None:
    """Raise ValueError if a model has other weights than when the run began."""
    if digest_of(model.named_parameters()) != directory.manifest["model_digest"]:
        raise ValueError(
            f"model {config.model!r} has other weights than when {directory.folder} was begun; get them back, or give"
            " another --output"
        )


def replay(method: Method, model: nn.Module, task: StreamTask, record: TaskRecord, folder: Path) -> nn.Module:
    """Redo a finished task from its record and the folder of its adapter."""
    if record.head:
        task.load_head(record.head)
    return method.replay(model, record, folder)


def _scores(model: nn.Module, tasks: list[StreamTask], track: Track) -> dict[str, Tensor]:
    scores, told = evaluated(model, tasks, track)
    return {
        "scores": torch.tensor(scores, dtype=torch.float64),
        "predictions": torch.tensor(list(told), dtype=torch.uint8),
    }
