"""Tasks: what a user's object must have, and what the defaults make of it."""

import pytest
import torch

from keeplora.task import Task, to_device


def test_a_task_without_batches_or_loss_says_which_method_is_missing():
    class Empty(Task):
        name = "empty"

    with pytest.raises(NotImplementedError, match=r"Empty must define batches\(\)"):
        Empty().batches()
    with pytest.raises(NotImplementedError, match=r"Empty must define loss\(model, batch\)"):
        Empty().loss(None, None)
    with pytest.raises(ValueError, match="no classes to build a classifier from"):
        Empty().start_head(None)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(7, 2), (torch.zeros(7, 2), torch.zeros(3)), {"scale": torch.tensor(1.0), "x": [torch.ones(7)]}],
)
def test_examples_are_counted_by_the_first_tensor_with_a_length(batch):
    assert Task().weight(batch) == 7


def test_a_batch_without_a_tensor_asks_for_weight():
    task = Task()
    task.name = "odd"
    with pytest.raises(ValueError, match=r"'odd'.*weight"):
        task.weight({"text": ["a", "b"]})


def test_every_tensor_of_a_nested_batch_is_moved_and_the_rest_is_kept():
    batch = {"a": torch.zeros(2), "b": [torch.ones(1), ("text", 3)]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0].device.type == "meta"
    assert moved["b"][1] == ("text", 3)
