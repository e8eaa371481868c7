"""Two processes share a run: one writes, both go on from what it wrote, and the run ends as if never cut off."""

import os
import sys
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing

import tiny
from keeplora.methods.cl_moe import CLMoE
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.phases import TaskPhases
from keeplora.runs.verify import certify
from keeplora.training.trainer import TrainConfig

CUT = 78


def in_one_of_two(rank, config, port, checkpoints_before_the_end):
    """Run in one of two processes that meet on a port; end both in the middle of the second task if asked to."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    torch.set_num_threads(1)
    keep, kept = TaskPhases._keep, []

    def cut(self, state):
        keep(self, state)
        kept.append(self.task)
        if kept.count("task1") == checkpoints_before_the_end:
            torch.distributed.barrier()
            os._exit(CUT)

    TaskPhases._keep = cut
    run(config)
    torch.distributed.destroy_process_group()


def run_in_two(config, port, checkpoints_before_the_end=None):
    processes = torch.multiprocessing.spawn(
        in_one_of_two, (config, port, checkpoints_before_the_end), nprocs=2, join=False
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
    assert run_in_two(config, port) == [0, 0]
    assert run_in_two(cut, port + 1, 3) == [CUT, CUT]
    assert read_manifest(cut.output)["now"]["phase"] == "train"
    assert run_in_two(cut, port + 2) == [0, 0]
    assert tiny.lasting(cut.output) == tiny.lasting(config.output)
    assert certify(cut.output).breaches == []
