"""New runs from the tasks of another, which stays as it is: without a task, or with other settings; and longer runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from keeplora.config import differences
from keeplora.data.benchmark import absolute, resolved
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.methods.registry import find_method, method_behind
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track, silent
from keeplora.runs.answers import evaluated, write_untouched
from keeplora.runs.atomic_store import made_whole
from keeplora.runs.config import RunConfig, plain_values
from keeplora.runs.directory import RunDirectory
from keeplora.runs.loop import replay, report, require_same_model
from keeplora.runs.open import (
    IN_PLACE,
    Places,
    config_of,
    open_probes,
    open_run,
    open_stream,
    read_run,
    require_recorded_tasks,
)
from keeplora.runs.verify import changes_between, updates_of
from keeplora.subspace.certificate import certificate_to_json, certificates, loss_of
from keeplora.training.trainer import best_device


def undo(folder: Path, task: str, output: Path, *, places: Places = IN_PLACE, track: Track = silent) -> Results:
    """Make a run directory that is another one without one of its finished tasks, and return its scores.

    The model is made from base model and updates in float32, as if the last task had never been learned; what another
    one protected is protected no longer, and new states are evaluated. `places` tell what was moved where. ValueError
    says that the task is not finished, later ones depend on it, or a file is damaged.
    """
    source = read_run(folder)
    finished = source.manifest["tasks"][: source.num_finished]
    if task not in finished:
        raise ValueError(f"{folder} has no finished task {task!r}; it has {', '.join(finished) or 'none'}")
    if len(source.manifest["tasks"]) == 1:
        raise ValueError(f"{task!r} is the only task of {folder}: without it there is only the base model")
    config = config_of(source, places)
    method = find_method(config.method)[0]
    if not method.one_by_one or (not method.stands_alone and task != finished[-1]):
        can = f"only its last task, {finished[-1]!r}" if method.one_by_one else "no task"
        raise ValueError(f"{config.method} can undo {can}: what it learns depends on the tasks before")
    kept = [index for index, name in enumerate(finished) if name != task]
    config = replace(config, without=(*config.without, task), output=output)
    old = {name: table for name, table in source.manifest["config"]["tasks"].items() if name != task}
    if list(old.items()) != list(plain_values(config)["tasks"].items()):
        raise ValueError(f"the tasks in {config.benchmark} are not those that {folder} learned; bring them back first")
    return _branch(source, config, kept, {"undone": task}, track)


def fork(folder: Path, config: RunConfig, *, track: Track = silent) -> Results:
    """Make a run directory that begins with the finished tasks of another one; `run(config)` continues it.

    ValueError says that a difference would not fit the finished tasks, there are none, or none is left to learn.
    """
    source = read_run(folder)
    if source.num_finished == 0:
        raise ValueError(f"{folder} has no finished task yet: a fork would be a new run; start one without --fork")
    before, fixed = config_of(source), find_method(config.method)[0].fixed
    require_recorded_tasks(source, before)
    different = [name for name in ("model", "evaluation") if getattr(before, name) != getattr(config, name)]
    if method_behind(before.method) != method_behind(config.method):
        different.append("method")
    else:
        options = [name for name in fixed if getattr(before.options, name) != getattr(config.options, name)]
        different += [f"options.{name}" for name in options]
    finished = source.manifest["tasks"][: source.num_finished]
    old, new = ({spec.name: resolved(spec) for spec in settings.stream} for settings in (before, config))
    if list(new)[: len(finished)] != finished or any(old.get(name, spec) != spec for name, spec in new.items()):
        different.append("the finished tasks")
    if different:
        lost = [name for name in finished if name not in new]
        hint = f" (not in the stream any more: {', '.join(lost)})" if lost else ""
        raise ValueError(
            f"a fork of {folder} cannot change {', '.join(different)}{hint}: the finished tasks were learned so; leave"
            " that as the run has it, and give new tasks with --more"
        )
    if len(new) == len(finished):
        cure = "add tasks with --more, or undo some"
        raise ValueError(f"{folder} is complete: nothing is left to learn with other settings; {cure}")
    changes = differences(source.manifest["config"], plain_values(config))
    return _branch(source, config, list(range(source.num_finished)), {"changes": changes}, track)


def continued(folder: Path, benchmark: str) -> RunConfig:
    """Return the configuration of a run that continues with the tasks of another benchmark after its own.

    `run(config, extend=True)` learns them as one run with all tasks would have. ValueError says that the run is not
    complete, the benchmark has nothing new, or the method does not learn task by task.
    """
    source = read_run(folder)
    config = config_of(source)
    require_recorded_tasks(source, config)
    if not find_method(config.method)[0].one_by_one:
        raise ValueError(f"{config.method} does not learn task by task, and cannot continue with more")
    benchmark = absolute(benchmark)
    if not source.is_complete:
        if benchmark in config.more:
            return config
        raise ValueError(f"{folder} is not complete; first: keeplora resume {folder}")
    known = source.manifest["tasks"]
    config = replace(config, more=(*config.more, benchmark))
    if set(plain_values(config)["tasks"]) <= set(known):
        undone = f", left out: {', '.join(config.without)}" if config.without else ""
        raise ValueError(
            f"benchmark {benchmark!r} has no task that is new to {folder} (learned: {', '.join(known)}{undone}); a task"
            " of another name is new"
        )
    return config


def with_more(folder: Path, given: RunConfig) -> RunConfig:
    """Return what `continued` does, given a run's own settings (others are a ValueError) and the further benchmark."""
    before = config_of(read_run(folder))
    own = replace(given, benchmark=before.benchmark)
    different = differences(plain_values(before), plain_values(own))
    if given.output.resolve() != folder.resolve():
        different.append(f"output was {str(folder)!r}, is {str(given.output)!r}")
    if different:
        raise ValueError(
            f"--continue takes the settings of {folder} ({'; '.join(different)}); leave them out, or give others to"
            f" --fork {folder} --more {given.benchmark} --output NEW"
        )
    return replace(own, more=continued(folder, given.benchmark).more)


def _branch(source: RunDirectory, config: RunConfig, kept: list[int], origin: dict[str, Any], track: Track) -> Results:
    """Write a run directory that begins with some finished tasks of another; it is there as a whole or not at all."""
    device = best_device()  # Processes meet here.
    if dist.is_initialized():
        raise ValueError("a run is undone or forked in one process only; run without a launcher")
    if source.folder.resolve() in config.output.resolve().parents:
        raise ValueError(f"{config.output} is inside {source.folder}; give another --output")
    values, old = plain_values(config), source.manifest
    tables, names = old["config"]["tasks"], list(values["tasks"])
    columns = {name: place for place, name in enumerate(old["tasks"]) if tables[name] == values["tasks"].get(name)}
    with made_whole(config.output) as part, open_run(part, values, names, settings=config.settings) as directory:
        model, tasks = open_stream(config, track)
        require_same_model(model, config, source)
        method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
        method.schedule(tasks)
        method.protect(model)
        directory.manifest["data"] = {task.name: dict(task.data) for task in tasks if task.data}
        directory.manifest["origin"] = {"run": str(source.folder.resolve()), **origin}
        zero_shot, told = _scores(model, tasks, old["zero_shot"], columns, track)
        write_untouched(directory, tasks, source.predictions() + told)
        directory.start(old["model_digest"], zero_shot, old["start"], old.get("probes", {}))
        probes = open_probes(config, track)
        for place, index in enumerate(track(kept, "merging", len(kept))):
            before, details = method.protected(), dict(source.tasks[index])
            record, adapter = source.record(index)
            updates = updates_of(record, device)
            weights_before = {layer: method.learned_weight(model, layer).clone() for layer in updates}
            model = replay(method, model, tasks[place], record, adapter)
            if place == index:
                details["scores"], told = _scores(model, tasks, details["scores"], columns, track)
                directory.write_predictions(source.predictions(index) + told, place)
            else:  # A state that the old run never had; how the task merges into it was never measured.
                details |= _scored_anew(directory, place, model, tasks, probes, track)
                changes = changes_between(weights_before, method, model, updates, before)
                certificate = certificates(method.protected(), changes)
                merge = {"merge_error": None, "merge_loss": loss_of(changes)}
                details["certificate"] = {**certificate_to_json(certificate), **merge}
            is_saved = config.save_model and index == kept[-1] and not config.keeps_beside
            directory.add_task(record, details, model if is_saved else None)
        return report(directory) if directory.is_complete else directory.results()


def _scored_anew(
    directory: RunDirectory,
    place: int,
    model: nn.Module,
    tasks: list[StreamTask],
    probes: list[StreamTask],
    track: Track,
) -> dict[str, Any]:
    """Return the scores of a state as `task.json` has them, and hand in what was answered."""
    scores, answers = evaluated(model, [*tasks, *probes], track)
    directory.write_predictions(answers, place)
    probed = dict(zip([probe.name for probe in probes], scores[len(tasks) :], strict=True))
    return {"scores": scores[: len(tasks)], **({"probes": probed} if probes else {})}


def _scores(
    model: nn.Module, tasks: list[StreamTask], recorded: list[float], columns: dict[str, int], track: Track
) -> tuple[list[float], bytes]:
    """Return the scores of a state of the old run: what it recorded, and a new evaluation of tasks without a column.

    The answers to those are returned too.
    """
    scores, told = evaluated(model, [task for task in tasks if task.name not in columns], track)
    late = iter(scores)
    return [recorded[columns[task.name]] if task.name in columns else next(late) for task in tasks], told
