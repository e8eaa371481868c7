"""Features from the last epoch of training, against a pass of their own."""

from dataclasses import replace
from itertools import count

import pytest
import torch

import tiny
from keeplora.layers import lora
from keeplora.layers.input_covariance import SEEN, SeenInputs, Watched, grams_of, input_grams
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.phases import TaskPhases
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace import protected
from keeplora.training.checkpoints import Checkpoints
from keeplora.training.state_file import from_bytes
from keeplora.training.trainer import TrainConfig, fit
from tiny import to_bytes

OPTIONS = {"targets": ("fc1", "fc2", "out"), "weight_energy": 0.4, "feature_energy": 0.8, "rank": 3}
OPTIONS |= {"allow_merge_loss": True}  # An update of nothing is lost to rounding.
STILL = TrainConfig(epochs=3, learning_rate=1e-9)
MOVING = TrainConfig(epochs=3, learning_rate=0.05)


def learned(features, train, model=None, task=None, targets=None):
    """Learn one task; return the method and the merged model."""
    model, task = model or tiny.MLP(), task or tiny.VectorTask()
    method = KeepLoRA(KeepLoRAConfig(features=features, **OPTIONS | ({} if targets is None else {"targets": targets})))
    adapted = method.before_task(model, task)
    fit(adapted, method.training_task(adapted, task, train.epochs), train)
    return method, method.after_task(adapted, task)


def test_with_weights_that_stand_still_the_directions_are_those_of_a_pass():
    found, wanted = (learned(features, STILL)[0].record.directions for features in ("last_epoch", "second_moment"))
    assert sum(directions.shape[1] for directions in wanted.values()) > 0
    for name, directions in wanted.items():
        assert found[name].shape == directions.shape
        assert linalg.project_out(found[name].T, directions).norm() < 1e-3


def test_the_text_towers_padding_is_left_out_too():
    targets = ("q_proj", "v_proj", "out_proj")
    found, wanted = (
        learned(features, STILL, tiny.clip_model(), tiny.classification_task(), targets)[0].record.directions
        for features in ("last_epoch", "second_moment")
    )
    assert any(directions.shape[1] for name, directions in wanted.items() if name.startswith("text_model"))
    for name, directions in wanted.items():
        assert found[name].shape == directions.shape
        assert linalg.project_out(found[name].T, directions).norm() < 1e-2


def test_only_the_last_epoch_counts():
    seen_inputs = []

    class Watching(tiny.VectorTask):
        def loss(self, model, batch):
            if layers := lora.lora_layers(model):  # None in the gradient pass.
                seen_inputs.append(len(layers["fc1"]._forward_hooks))
            return super().loss(model, batch)

    method, merged = learned("last_epoch", MOVING, task=Watching())
    assert seen_inputs[:9] == [0] * 6 + [1] * 3
    # The first layer reads the data itself, which no training changes.
    exact = input_grams(merged, tiny.VectorTask(), ["fc1"])
    bases = {"fc1": method.bases["fc1"][:, : -method.record.directions["fc1"].shape[1] or None]}
    wanted = protected.new_directions(bases, exact, 0.8)["fc1"]
    assert linalg.project_out(method.record.directions["fc1"].T, wanted).norm() < 1e-3


def test_one_layers_input_is_collected_once_for_all_that_share_it():
    model, task = tiny.clip_model(), tiny.classification_task()
    method = KeepLoRA(KeepLoRAConfig(features="last_epoch", rank=2, weight_energy=0.3))
    adapted = method.before_task(model, task)
    fit(adapted, method.training_task(adapted, task, 1), replace(STILL, epochs=1))
    watcher = getattr(adapted, SEEN).watcher
    assert len(watcher.leaders) == 16
    assert sum(own[0].total is not None for own in watcher.accumulators.values()) == 8


def test_a_model_trained_without_the_lesson_is_an_error_that_says_the_cure():
    method, task = KeepLoRA(KeepLoRAConfig(features="last_epoch", **OPTIONS)), tiny.VectorTask()
    adapted = method.before_task(tiny.MLP(), task)
    fit(adapted, task, STILL)
    with pytest.raises(ValueError, match="'vectors': features = 'last_epoch' needs the model to be trained on what"):
        method.after_task(adapted, task)


def test_a_model_whose_last_epoch_did_not_come_is_an_error_that_says_the_cure():
    method, task = KeepLoRA(KeepLoRAConfig(features="last_epoch", **OPTIONS)), tiny.VectorTask()
    adapted = method.before_task(tiny.MLP(), task)
    fit(adapted, method.training_task(adapted, task, 4), STILL)
    with pytest.raises(ValueError, match="for so many epochs"):
        method.after_task(adapted, task)


def test_batches_without_a_length_are_an_error_that_says_the_cure():
    class Endless(tiny.VectorTask):
        def batches(self):
            yield from self.data

    method, task = KeepLoRA(KeepLoRAConfig(features="last_epoch", **OPTIONS)), Endless()
    with pytest.raises(ValueError, match="needs the number of batches; let batches"):
        method.training_task(method.before_task(tiny.MLP(), task), task, 2)


def test_nothing_of_it_stays_in_the_merged_model():
    _, merged = learned("last_epoch", MOVING)
    assert set(merged.state_dict()) == set(tiny.MLP().state_dict())
    assert not any(module._forward_pre_hooks for module in merged.modules())


def test_a_lesson_is_the_task_itself_unless_the_option_is_set():
    task = tiny.VectorTask()
    method = KeepLoRA(KeepLoRAConfig(**OPTIONS))
    assert method.training_task(method.before_task(tiny.MLP(), task), task, 3) is task


@pytest.mark.parametrize("num_seen", [0, 4, 7, 9])
def test_what_was_seen_survives_being_kept_and_taken_up(num_seen):
    task, model = tiny.VectorTask(), tiny.MLP()
    widths = {name: model.get_submodule(name).in_features for name in OPTIONS["targets"]}
    layers = {name: model.get_submodule(name) for name in widths}

    def train(seen, start, end):
        watched = Watched(task, seen, layers, epochs=3)
        batches = [batch for _ in range(3) for batch in task.batches()]
        for batch in batches[start:end]:
            watched.loss(model, batch)
        return seen

    whole = train(SeenInputs(task, widths), 0, 9)
    state = from_bytes(to_bytes(train(SeenInputs(task, widths), 0, num_seen).get_extra_state()))
    again = SeenInputs(task, widths)
    again.set_extra_state(state)
    train(again, num_seen, 9)
    assert again.get_extra_state().equal(whole.get_extra_state())
    for name, gram in grams_of(whole, task, torch.device("cpu")).items():
        assert grams_of(again, task, torch.device("cpu"))[name].equal(gram)


@pytest.mark.slow
def test_a_run_that_is_cut_off_at_any_checkpoint_ends_as_one_that_was_not(tmp_path, monkeypatch):
    config = RunConfig(
        benchmark=str(tiny.write_benchmark(tmp_path, tasks=2, per_class=4)),
        model=str(tiny.save_dual_encoder(tmp_path / "model")),
        output=tmp_path / "whole",
        train=TrainConfig(epochs=2, batch_size=5, learning_rate=0.05),
        options=KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.8, features="last_epoch"),
        checkpoint_steps=1,
    )
    kept, keep = [], TaskPhases._keep
    with monkeypatch.context() as patch:
        patch.setattr(TaskPhases, "_keep", lambda self, state: (kept.append(1), keep(self, state)))
        run(config)
    assert len(kept) >= 12

    class CutOff(Exception):
        """Ends a run on purpose."""

    for place in range(len(kept)):
        number, cut = count(), replace(config, output=tmp_path / f"{place}")

        def stop(self, state, number=number, place=place):
            keep(self, state)
            if next(number) == place:
                raise CutOff

        with monkeypatch.context() as patch:
            patch.setattr(TaskPhases, "_keep", stop)
            with pytest.raises(CutOff):
                run(cut)
        run(cut)
        assert tiny.lasting(cut.output) == tiny.lasting(config.output), place


def test_checkpoints_of_earlier_epochs_hold_no_gram():
    task = tiny.VectorTask()
    method = KeepLoRA(KeepLoRAConfig(features="last_epoch", **OPTIONS))
    adapted = method.before_task(tiny.MLP(), task)
    states = []
    fit(adapted, method.training_task(adapted, task, 3), MOVING, checkpoints=Checkpoints(keep=states.append))
    sizes = [state["extra"][0][f"{SEEN}._extra_state"].numel() for state in states]
    assert sizes[:2] == [4, 4]
    assert sizes[2] > 11 * 11
