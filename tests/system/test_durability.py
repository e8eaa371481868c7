"""A run survives anything: SIGKILL at any moment, a crash or a full disk at every single write, any flipped byte."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch

import tiny
from keeplora.layers import gradients
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.report import charts
from keeplora.runs import atomic_store as disk
from keeplora.runs.config import RunConfig
from keeplora.runs.directory import UNFINISHED, RunDirectory
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.open import read_run
from keeplora.runs.phases import TaskPhases
from keeplora.runs.verify import certify
from keeplora.training.checkpoints import Checkpoints
from keeplora.training.profiling import Clock
from keeplora.training.state_file import from_bytes
from keeplora.training.trainer import TrainConfig, fit
from tiny import to_bytes

PHASES = ("gradient", "initialise", "train", "merge", "features", "evaluate", "record")

KILLS = 50

OPERATIONS = ("write_through", "rename", "remove")
"""Every way in which the library changes a run directory."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of three tasks with everything that a run may leave: heads, checkpoints at every second step."""
    folder = tmp_path_factory.mktemp("durability")
    benchmark = tiny.write_benchmark(folder, tasks=3, per_class=4)
    options = KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.8, classifier="cosine")
    return RunConfig(
        benchmark=str(benchmark),
        model=str(tiny.save_dual_encoder(folder / "model")),
        output=folder / "whole",
        train=TrainConfig(epochs=2, batch_size=5, learning_rate=0.05),
        options=options,
        checkpoint_steps=2,
    )


@pytest.fixture(scope="module")
def whole(config):
    """What an uninterrupted run leaves."""
    run(config)
    return tiny.lasting(config.output)


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported, and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keeplora.runs.loop", "tiny"])
    return context


def report_phases(pipe):
    """Send the name of every phase when it begins."""
    phase, finish = Clock.phase, RunDirectory.add_task

    def begun(self, name):
        pipe.send(name)
        return phase(self, name)

    def finished(self, *args):
        pipe.send("record")
        return finish(self, *args)

    Clock.phase, RunDirectory.add_task = begun, finished


class Crash(BaseException):
    """Ends a run as a crash would: nobody catches it."""


def crashing(operation, name, number, moment, counter):
    """Crash before or during the number-th change of the disk; after one is before the next."""

    def changed(*args):
        if next(counter) == number:
            if moment == "during" and name == "write_through":
                operation(args[0], args[1][: len(args[1]) // 2])
            raise Crash
        return operation(*args)

    return changed


def refusing(operation, name, number, reason, counter):
    """Refuse every change of the disk from the number-th on."""

    def changed(*args):
        if next(counter) >= number:
            raise OSError(reason, os.strerror(reason))
        return operation(*args)

    return changed


@contextmanager
def disk_that(fails, number, how):
    """Let the disk fail at its number-th change, counted over all kinds."""
    counter = count()
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(disk, name, fails(getattr(disk, name), name, number, how, counter))
        yield


def in_process(config, pipe):
    """Run quietly in a process of its own, and report its phases."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    report_phases(pipe)
    run(config)


def next_phase(reader):
    """Return the next phase that is reported, None when the process has ended."""
    try:
        return reader.recv()
    except EOFError:
        return None


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_ends_as_one_that_was_not(config, whole, processes, tmp_path):
    draw = random.Random(0)
    hit = dict.fromkeys(PHASES, 0)
    for attempt in count():
        output = tmp_path / f"run{attempt}"
        is_over = False
        while not is_over:
            reader, writer = processes.Pipe(duplex=False)
            process = processes.Process(target=in_process, args=(replace(config, output=output), writer))
            process.start()
            writer.close()
            target = draw.choice(PHASES) if sum(hit.values()) < KILLS else None
            while (phase := next_phase(reader)) is not None:
                if phase == target:
                    time.sleep(draw.uniform(0, 0.05))
                    os.kill(process.pid, signal.SIGKILL)
                    break
            process.join()
            is_over = process.exitcode == 0
            if not is_over:
                assert process.exitcode == -signal.SIGKILL
                hit[target] += 1
        assert tiny.lasting(output) == whole
        assert set(tiny.tree(output)) == set(tiny.tree(config.output))
        if sum(hit.values()) >= KILLS:
            break
    assert all(hit.values()), hit


def unpainted(figure):
    """Stand in for a picture: painting takes a third of a short run, and whether a file lasts does not depend on it."""
    return f"{figure.get_size_inches()}".encode()


@pytest.fixture(scope="module")
def short(config, tmp_path_factory):
    """A shorter run, what it leaves, and in which ways it changes the disk, in their order."""
    output = tmp_path_factory.mktemp("short") / "whole"
    settings = replace(config.train, epochs=1)
    chosen = replace(config, output=output, first_tasks=2, train=settings, checkpoint_steps=None)
    changes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "png", unpainted)
        for name in OPERATIONS:
            real = getattr(disk, name)
            patch.setattr(disk, name, lambda *args, real=real, name=name: (changes.append(name), real(*args)))
        run(chosen)
    return chosen, (tiny.lasting(output), set(tiny.tree(output))), changes


PARTS = 6  # So that the crashes can be tried on several cores.


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_crash_at_every_single_change_of_the_disk_loses_nothing(short, tmp_path, moment, part, monkeypatch):
    monkeypatch.setattr(charts, "png", unpainted)
    chosen, expected, changes = short
    assert min(changes.count(name) for name in OPERATIONS) > 10
    for number, name in enumerate(changes):
        if number % PARTS != part or (moment == "during" and name != "write_through"):
            continue
        cut = replace(chosen, output=tmp_path / f"{number}")
        with disk_that(crashing, number, moment), pytest.raises(Crash):
            run(cut)
        run(cut)
        assert (tiny.lasting(cut.output), set(tiny.tree(cut.output))) == expected, number
        shutil.rmtree(cut.output)


@pytest.mark.slow
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing_more_is_an_error_and_loses_nothing(short, tmp_path, reason, monkeypatch):
    monkeypatch.setattr(charts, "png", unpainted)
    chosen, expected, changes = short
    for number in range(0, len(changes), 3):
        cut = replace(chosen, output=tmp_path / f"{number}")
        with disk_that(refusing, number, reason), pytest.raises(OSError, match=os.strerror(reason)):
            run(cut)
        run(cut)
        assert (tiny.lasting(cut.output), set(tiny.tree(cut.output))) == expected, number
        shutil.rmtree(cut.output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_an_error(config, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(OSError, match="Permission denied"):
        run(replace(config, output=tmp_path / "closed/run"))


class CutOff(Exception):
    """Ends a run on purpose."""


def cut_off(config, output, monkeypatch):
    """End a run when its second task has been trained for a while; return its configuration."""
    kept = count()
    keep = TaskPhases._keep

    def cut(self, state):
        keep(self, state)
        if self.task == "task1" and next(kept) == 1:
            raise CutOff

    config = replace(config, output=output)
    with monkeypatch.context() as patch:
        patch.setattr(TaskPhases, "_keep", cut)
        with pytest.raises(CutOff):
            run(config)
    return config


def flipped(content, share):
    """Return some bytes with one changed, at a share of their length."""
    place = round(share * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :]


@pytest.mark.slow
def test_a_flipped_byte_in_any_file_is_found_by_certify_and_by_the_run_that_reads_it(config, tmp_path, monkeypatch):
    cut = cut_off(config, tmp_path / "cut", monkeypatch)
    files = tiny.tree(cut.output)
    assert {name.split("/")[0] for name in files} == {"run.json", "metrics.json", "tasks", "model", UNFINISHED}
    assert {"initialise.safetensors", "train.safetensors"} <= {name.split("/")[-1] for name in files}
    unread = {"model/model.safetensors"}  # A run goes on from the base model and the adapters.
    assert unread < set(files)
    for share in (0, 0.5, 1):
        for name in set(files) - unread:
            (cut.output / name).write_bytes(flipped(files[name], share))
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                run(cut)
            (cut.output / name).write_bytes(files[name])
        (cut.output / "run.json").write_bytes(flipped(files["run.json"], share))
        with pytest.raises(ValueError, match=r"run\.json"):
            certify(cut.output)
        (cut.output / "run.json").write_bytes(files["run.json"])
        for name in set(files) - {"run.json"}:
            (cut.output / name).write_bytes(flipped(files[name], share))
        found = certify(cut.output).breaches
        for name in set(files) - {"run.json"}:
            assert f"{cut.output / name} is not what the run wrote: it was changed or damaged" in found
            (cut.output / name).write_bytes(files[name])
    run(cut)


@pytest.mark.slow
def test_training_goes_on_from_the_last_checkpoint_and_computes_nothing_again(config, whole, tmp_path, monkeypatch):
    cut = cut_off(config, tmp_path / "cut", monkeypatch)
    now = read_manifest(cut.output)["now"]
    assert (now["task"], now["phase"]) == ("task1", "train")
    collected = []
    real = gradients.mean_gradients

    def collecting(model, task, *args, **options):
        collected.append(task.name)
        return real(model, task, *args, **options)

    monkeypatch.setattr(gradients, "mean_gradients", collecting)
    seen = []

    def track(items, description, total=None):
        seen.append((description, total))
        return items

    run(cut, track=track)
    assert collected == ["task2"]
    assert ("task1: epoch 1/2", 3) not in seen
    assert tiny.lasting(cut.output) == whole


@pytest.mark.slow
def test_the_checkpoints_are_no_more_than_the_given_time_apart(config, tmp_path, monkeypatch):
    kept = []
    keep = TaskPhases._keep
    monkeypatch.setattr(TaskPhases, "_keep", lambda self, state: (kept.append(state["batch"]), keep(self, state)))
    often = replace(config, output=tmp_path / "often", first_tasks=1, checkpoint_steps=None, checkpoint_minutes=1e-9)
    run(often)
    assert kept == [1, 2, 0, 1, 2, 0]


@pytest.mark.slow
def test_a_run_may_go_on_with_other_checkpoints(config, whole, tmp_path, monkeypatch):
    cut = cut_off(config, tmp_path / "cut", monkeypatch)
    run(replace(cut, checkpoint_steps=1, checkpoint_minutes=1.0))
    assert tiny.lasting(cut.output) == whole


@pytest.mark.slow
def test_another_model_of_the_same_name_is_refused(config, tmp_path, monkeypatch):
    place = shutil.copytree(config.model, tmp_path / "model")
    cut = cut_off(replace(config, model=str(place)), tmp_path / "cut", monkeypatch)
    tiny.save_dual_encoder(place, seed=1)
    with pytest.raises(ValueError, match=r"has other weights than when .* was begun"):
        run(cut)


def test_a_changed_setting_is_refused_while_the_first_task_is_being_learned(config, tmp_path, monkeypatch):
    cut = replace(config, output=tmp_path / "cut")

    def end(self, state):
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(TaskPhases, "_keep", end)
        with pytest.raises(CutOff):
            run(cut)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run(replace(cut, seed=1))


@pytest.mark.slow
def test_the_end_of_training_is_kept_however_rare_the_checkpoints(config, whole, tmp_path, monkeypatch):
    rare = replace(config, output=tmp_path / "rare", checkpoint_steps=1000)

    def end(*args, **options):
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(KeepLoRA, "features", end)
        with pytest.raises(CutOff):
            run(rare)
    assert read_manifest(rare.output)["now"]["phase"] == "train"
    epochs = []

    def track(items, description, total=None):
        epochs.append(description)
        return items

    run(rare, track=track)
    assert not [text for text in epochs if text.startswith("task0: epoch")]
    assert tiny.lasting(rare.output) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lock", "run.json", "unfinished", "staged", "tasks/01-task0/adapter", "run.json.part"]
)
def test_a_symbolic_link_in_a_run_is_refused_and_what_it_points_to_is_left_alone(config, whole, tmp_path, name):
    linked = shutil.copytree(config.output, tmp_path / "linked")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (linked / "staged").mkdir(exist_ok=True)
    if (linked / name).is_dir():
        shutil.rmtree(linked / name)
    else:
        (linked / name).unlink(missing_ok=True)
    (linked / name).symlink_to(victim if "." not in name and name != "lock" else victim / "precious")
    for action in (lambda: run(replace(config, output=linked)), lambda: certify(linked), lambda: read_run(linked)):
        with pytest.raises(ValueError, match=r"is a symbolic link; a run directory has none|holds no run"):
            action()
    assert tiny.tree(victim) == {"precious": b"x"}


@pytest.mark.slow
def test_a_run_is_read_while_it_is_being_written(config, tmp_path, monkeypatch):
    live = replace(config, output=tmp_path / "live", first_tasks=2)
    real, seen = disk.rename, []

    def watched(source, target):
        real(source, target)
        seen.append(read_run(live.output).num_finished)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", watched)
        run(live)
    assert set(seen) == {0, 1, 2}


class Shuffled:
    """Batches in a new order for each pass."""

    def __init__(self, task):
        self.task = task

    def __len__(self):
        return len(self.task.data)

    def __iter__(self):
        yield from (self.task.data[i] for i in torch.randperm(len(self.task.data)).tolist())


class GloballyShuffledTask(tiny.VectorTask):
    """Draws the order of its batches from torch's own generator at the start of each epoch."""

    def batches(self):
        return Shuffled(self)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.slow
def test_training_resumes_from_every_checkpoint_to_the_same_weights(accumulation, schedule):
    settings = TrainConfig(epochs=3, learning_rate=0.05, schedule=schedule, accumulation=accumulation)
    task, states = GloballyShuffledTask(sizes=(4, 3, 5, 2, 4)), []

    def trained(last=None):
        torch.manual_seed(5)
        model = tiny.MLP()
        places = Checkpoints(last=last, keep=lambda state: states.append(to_bytes(state)), steps=1)
        losses = fit(model, task, settings, checkpoints=places)
        return losses, {name: value.clone() for name, value in model.state_dict().items()}

    losses, weights = trained()
    kept = list(states)
    assert len(kept) == 3 * -(-5 // accumulation)
    for content in kept:
        again, resumed = trained(from_bytes(content))
        assert again == losses
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)
