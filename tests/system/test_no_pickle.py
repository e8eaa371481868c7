"""Weights come from safetensors alone: a pickle runs whatever code it holds when it is read."""

import pytest
import torch
from safetensors.torch import load_file

import tiny
from keeplora.cli import main as cli
from keeplora.layers import lora, merging
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.models.registry import family_of
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.training.trainer import TrainConfig


class Bomb:
    """What a pickle can do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(params=["pytorch_model.bin", "model.pt"])
def pickled(tmp_path, request):
    """A model folder whose weights are a pickle that leaves a file behind when it is read."""
    folder = tiny.save_dual_encoder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "exploded"), folder / request.param)
    return folder


def test_a_pickled_model_is_refused_unread(pickled, tmp_path):
    with pytest.raises(ValueError, match=r"read from safetensors alone: a pickled \.bin or \.pt could run any code"):
        family_of(str(pickled)).load(str(pickled))
    assert not (tmp_path / "exploded").exists()


def test_a_model_that_is_there_in_both_forms_is_read_from_safetensors(tmp_path):
    folder = tiny.save_dual_encoder(tmp_path / "model")
    torch.save(Bomb(tmp_path / "exploded"), folder / "pytorch_model.bin")
    model = family_of(str(folder)).load(str(folder))
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_adapter_is_refused_unread(tmp_path):
    adapted = lora.attach(tiny.MLP(), {"fc1": 2}, {"fc1": 1.0})
    folder = tiny.write_adapter(tmp_path / "adapter", lora.detach(adapted))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "exploded"), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors; adapters are read from"):
        merging.merge_from(tiny.MLP(), folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_pickles_in_a_run_are_not_read_and_are_found(tmp_path, capsys):
    benchmark = tiny.write_benchmark(tmp_path, tasks=1, per_class=2)
    config = RunConfig(
        benchmark=str(benchmark),
        model=str(tiny.save_dual_encoder(tmp_path / "model")),
        output=tmp_path / "run",
        train=TrainConfig(epochs=1, batch_size=6),
        options=KeepLoRAConfig(rank=2),
    )
    run(config)
    for place in ("model/pytorch_model.bin", "tasks/01-task0/adapter/adapter_model.bin"):
        torch.save(Bomb(tmp_path / "exploded"), tmp_path / "run" / place)
    with pytest.raises(SystemExit) as caught:
        cli.main(["certify", str(tmp_path / "run")])
    assert caught.value.code == 1
    out = "".join(capsys.readouterr().out.split())
    assert "pytorch_model.binisnotofthisrun" in out
    assert "adapter_model.binisnotofthisrun" in out
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "run")])
    assert "is not of this run" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "exploded").exists()
