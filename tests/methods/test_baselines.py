from collections import Counter

import pytest
import torch

from keeplora.layers import lora
from keeplora.methods.base import MethodConfig
from keeplora.methods.baselines import Joint, LoRAFT
from keeplora.training.trainer import TrainConfig, fit
from tiny import MLP, VectorTask, train

CONFIG = MethodConfig(targets=("fc1", "fc2", "out"), rank=3, alpha=2.0)


def stream():
    return [VectorTask(f"task{seed}", seed, sizes) for seed, sizes in enumerate([(8, 8, 5), (8, 3), (8, 8, 8, 1)])]


def losses(model, tasks):
    with torch.no_grad():
        return [float(task.loss(model, task.data[0])) for task in tasks]


def test_every_batch_of_every_task_comes_once_an_epoch_in_mixed_order():
    tasks = stream()
    union = Joint(CONFIG, seed=3).schedule(tasks)[0]
    assert len(union.batches()) == 9
    first, second = list(union.batches()), list(union.batches())
    for epoch in (first, second):
        assert Counter(place for place, _ in epoch) == {0: 3, 1: 2, 2: 4}
        for place, task in enumerate(tasks):
            given = [batch for index, batch in epoch if index == place]
            assert all(mine[0] is theirs[0] for mine, theirs in zip(given, task.batches(), strict=True))
    orders = [[place for place, _ in epoch] for epoch in (first, second)]
    assert orders[0] != orders[1] != sorted(orders[1])
    again = Joint(CONFIG, seed=3).schedule(stream())[0]
    assert [place for place, _ in again.batches()] == orders[0]


def test_a_batch_has_the_loss_and_weight_of_its_own_task():
    tasks, model = stream(), MLP()
    union = Joint(CONFIG).schedule(tasks)[0]
    for place, batch in union.batches():
        assert union.loss(model, (place, batch)).equal(tasks[place].loss(model, batch))
        assert union.weight((place, batch)) == len(batch[0])
        assert union.padding_mask("fc1", (place, batch)) is None


def test_a_batch_is_cut_and_sampled_as_its_own_task_does():
    class Cut(VectorTask):
        def micro_batches(self, batch):
            return [tuple(value[:3] for value in batch), tuple(value[3:] for value in batch)]

        def sample(self, batch):
            return tuple(value[:2] for value in batch)

    tasks = [VectorTask("whole"), Cut("cut")]
    union = Joint(MethodConfig()).schedule(tasks)[0]
    for number, batch in union.batches():
        parts = list(union.micro_batches((number, batch)))
        sample = union.sample((number, batch))
        assert [place for place, _ in (*parts, sample)] == [number] * (len(parts) + 1)
        assert [len(part[0]) for _, part in parts] == ([3, len(batch[0]) - 3] if number else [len(batch[0])])
        assert len(sample[1][0]) == (2 if number else len(batch[0]))


def test_the_first_place_learns_all_tasks_and_the_others_nothing():
    tasks, method, model = stream(), Joint(CONFIG), MLP()
    scheduled = method.schedule(tasks)
    before = losses(model, tasks)
    torch.manual_seed(0)
    adapted = method.before_task(model, scheduled[0])
    fit(adapted, scheduled[0], TrainConfig(epochs=20, learning_rate=0.05))
    model = method.after_task(adapted, scheduled[0])
    after = losses(model, tasks)
    assert all(now < start - 0.05 for now, start in zip(after, before, strict=True))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for training_task in scheduled[1:]:
        adapted = method.before_task(model, training_task)
        assert not any(parameter.requires_grad for parameter in adapted.parameters())
        assert fit(adapted, training_task, TrainConfig()) == []
        assert method.after_task(adapted, training_task) is model
        assert method.record.adapter is None
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_joint_training_on_one_task_is_plain_lora():
    models = []
    for kind in (Joint, LoRAFT):
        torch.manual_seed(5)
        method, task = kind(CONFIG), stream()[0]
        training_task = method.schedule([task])[0]
        adapted = method.before_task(MLP(), training_task)
        train(adapted, training_task)
        models.append(method.after_task(adapted, training_task))
    for mine, plain in zip(*(model.state_dict().values() for model in models), strict=True):
        assert mine.equal(plain)


def test_tasks_with_different_epochs_cannot_be_trained_together():
    tasks = stream()
    tasks[1].epochs = 5
    with pytest.raises(ValueError, match="one number of epochs for all tasks"):
        Joint(CONFIG).schedule(tasks)


def test_the_rank_is_that_of_all_tasks_together_up_to_the_layers_own():
    tasks, method = stream(), Joint(CONFIG)
    adapted = method.before_task(MLP(), method.schedule(tasks)[0])
    layers = lora.lora_layers(adapted)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"fc1": 9, "fc2": 9, "out": 5}
    assert all(layer.scaling["default"] == pytest.approx(2.0 / 3) for layer in layers.values())
