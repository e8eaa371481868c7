"""Two processes share a run: one writes, both go on from what it wrote, and the run ends as if never cut off."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, TensorDataset

import tiny
from keeplora.errors import LearningError
from keeplora.methods.cl_moe import CLMoE
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.methods.registry import find_method
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.phases import TaskPhases
from keeplora.runs.verify import certify
from keeplora.training.trainer import TrainConfig, best_device, fit

CUT = 78


def in_one_of_two(rank, configs, port, checkpoints_before_the_end):
    """Run in one of two processes that meet on a port; end both in the last run's second task if asked to."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.set_num_threads(1)
    keep, kept = TaskPhases._keep, []

    def cut(self, state):
        keep(self, state)
        kept.append((self.directory.folder, self.task))
        if kept.count((configs[-1].output, "task1")) == checkpoints_before_the_end:
            torch.distributed.barrier()
            os._exit(CUT)

    TaskPhases._keep = cut
    for config in configs:
        run(config)
    torch.distributed.destroy_process_group()


def run_in_two(configs, port, checkpoints_before_the_end=None):
    processes = torch.multiprocessing.spawn(
        in_one_of_two, (configs, port, checkpoints_before_the_end), nprocs=2, join=False
    )
    for process in processes.processes:
        process.join()
    return [process.exitcode for process in processes.processes]


OPTIONS = {
    "keeplora": KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.8),
    "last_epoch": KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.8, features="last_epoch"),
    "cl_moe": CLMoE.Config(rank=2, num_experts=3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "port"), [("keeplora", 29511), ("last_epoch", 29516), ("cl_moe", 29521)])
def test_a_run_in_two_processes_that_is_cut_off_ends_as_one_that_was_not(tmp_path, name, port):
    benchmark = tiny.write_benchmark(tmp_path, tasks=2, per_class=4)
    config = RunConfig(
        benchmark=str(benchmark),
        model=str(tiny.save_dual_encoder(tmp_path / "model")),
        output=tmp_path / "whole",
        train=TrainConfig(epochs=2, batch_size=3, learning_rate=0.05),
        method="cl_moe" if name == "cl_moe" else "keeplora",
        options=OPTIONS[name],
        checkpoint_steps=1,
    )
    cut = replace(config, output=tmp_path / "cut")
    assert run_in_two([config, cut], port, 3) == [CUT, CUT]
    assert read_manifest(cut.output)["now"]["phase"] == "train"
    assert run_in_two([cut], port + 1) == [0, 0]
    assert tiny.lasting(cut.output) == tiny.lasting(config.output)
    assert certify(cut.output).breaches == []


class Bad(tiny.VectorTask):
    """Its batches are shared; the loss of one is no number."""

    def __init__(self, when):
        super().__init__(sizes=(32,))
        self.when = when

    def batches(self):
        return DataLoader(TensorDataset(*self.data[0]), batch_size=8)

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        is_pass = not any(parameter.requires_grad for parameter in model.parameters())
        return loss * float("nan") if (is_pass, torch.distributed.get_rank()) == (self.when == "gradient", 1) else loss


WRONG = {"gradient": "gradient pass", "train": "the loss is nan"}


def in_one_of_two_with_a_bad_batch(rank, port, folder):
    """Learn tasks whose loss is no number on the second process alone; write what each is told."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.set_num_threads(1)
    best_device()
    for when in WRONG:
        method = find_method("keeplora")[0](KeepLoRAConfig(rank=2, weight_energy=0.3, targets=("fc1", "fc2")))
        try:
            adapted = method.before_task(tiny.MLP(), Bad(when))
            fit(adapted, Bad(when), TrainConfig(epochs=1, batch_size=8))
        except LearningError as error:
            (folder / f"{when}{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_both(tmp_path):
    torch.multiprocessing.spawn(in_one_of_two_with_a_bad_batch, (29531, tmp_path), nprocs=2)
    for when, said in WRONG.items():
        assert said in (tmp_path / f"{when}1").read_text()
        assert (tmp_path / f"{when}0").read_text() == (tmp_path / f"{when}1").read_text(), "the first one speaks"


@pytest.mark.slow
def test_two_processes_say_everything_once(tmp_path):
    benchmark = tiny.write_benchmark(tmp_path, tasks=2, per_class=4)
    model, output = tiny.save_dual_encoder(tmp_path / "model"), tmp_path / "run"
    launch = ["-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541"]
    settings = ["--benchmark", str(benchmark), "--model", str(model), "--rank", "99", "--epochs", "1"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    run = ["-m", "keeplora", "run", "--batch-size", "3", *settings, "--output", str(output)]
    done = subprocess.run([sys.executable, *launch, *run], env=env, capture_output=True, text=True, check=False)
    text = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, text
    assert text.count("after learning") == text.count("(2 processes took part)") == 1
    assert text.count("layers have fewer directions") == 1
    assert read_manifest(output)["processes"] == 2
