"""What the tests of the methods that add a penalty share: training with it, and a resumed run."""

import torch

from keeplora.layers import lora
from tiny import MLP, VectorTask, write_adapter

NAMES = ("fc1", "fc2", "out")


def started(method, model, seed=9):
    """Return the model to train on another task."""
    torch.manual_seed(seed)
    return method.before_task(model, VectorTask(seed=seed))


def penalised(adapted, seed=3):
    """Give `b` random values, so that the update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(adapted).values():
        b = layer.lora_B["default"].weight
        b.data = 0.3 * torch.randn(b.shape, generator=generator)
    return adapted


def updates(adapted):
    """Return every layer's update in float64."""
    return {name: b.double() @ a.double() for name, (a, b) in lora.factors_of(adapted).items()}


def learn(method, model, seeds, task=VectorTask):
    """Learn tasks with the method's penalty in a plain loop; return the records and the model."""
    records = []
    for seed in seeds:
        torch.manual_seed(seed)
        training_task = task(f"task{seed}", seed)
        adapted = method.before_task(model, training_task)
        steps = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
        for batch in [*training_task.batches()] * 2:
            extra = method.penalty(adapted)
            loss = training_task.loss(adapted, batch) + (0 if extra is None else extra)
            steps.zero_grad()
            loss.backward()
            steps.step()
        model = method.after_task(adapted, training_task)
        records.append(method.record)
    return records, model


def require_an_equal_resumed_run(build, folder):
    """Learn three tasks in one go, and the third again after a replay of two; return both methods."""
    one, other = build(), build()
    records, model = learn(one, MLP(), seeds=(0, 1))
    replayed = MLP()
    for i, record in enumerate(records):
        replayed = other.replay(replayed, record, write_adapter(folder / str(i), record.adapter))
    (last,), model = learn(one, model, seeds=(2,))
    (again,), replayed = learn(other, replayed, seeds=(2,))
    assert last.adapter.files() == again.adapter.files()
    for (name, value), repeated in zip(model.state_dict().items(), replayed.state_dict().values(), strict=True):
        assert value.equal(repeated), name
    return one, other
