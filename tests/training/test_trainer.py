"""One task's optimisation, against plain PyTorch loops."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import tiny
from keeplora.errors import LearningError
from keeplora.layers import lora
from keeplora.layers.input_covariance import SEEN, grams_of
from keeplora.methods.base import MethodConfig
from keeplora.methods.baselines import Joint, LoRAFT
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.models.dual_encoder import ClassificationTask
from keeplora.task import DeferredGradient
from keeplora.training import trainer
from keeplora.training.trainer import TrainConfig, best_device, fit, seed_everything


class LoaderTask(tiny.VectorTask):
    """The same vectors from a shuffling DataLoader, whose order follows from a seed."""

    def __init__(self, batch_size=8, order=0):
        super().__init__(sizes=(30,))
        generator = torch.Generator().manual_seed(order)
        self.loader = DataLoader(TensorDataset(*self.data[0]), batch_size, shuffle=True, generator=generator)

    def batches(self):
        return self.loader


def state(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def rates_of(action):
    """Return the learning rate of every optimiser step inside."""
    rates = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        action()
    finally:
        handle.remove()
    return rates


def plain_loop(model, groups, *, epochs, config, scheduler_of):
    """The obvious loop; a group is what one step sees, its loss the mean over its batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = scheduler_of(optimizer, epochs * len(groups))
    for _ in range(epochs):
        for group in groups:
            optimizer.zero_grad()
            sum(F.cross_entropy(model(x), y) / len(group) for x, y in group).backward()
            optimizer.step()
            scheduler.step()
    return model


def one_cycle(optimizer, steps):
    return OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps)


def cosine(optimizer, steps):
    return CosineAnnealingLR(optimizer, T_max=steps)


@pytest.mark.parametrize(("schedule", "reference"), [("one_cycle", one_cycle), ("cosine", cosine)])
def test_training_is_adamw_with_the_named_schedule(schedule, reference):
    config = TrainConfig(epochs=3, learning_rate=0.02, weight_decay=0.1, schedule=schedule, warmup=0.0)
    task, model = tiny.VectorTask(), tiny.MLP()
    expected = plain_loop(tiny.MLP(), [[batch] for batch in task.data], epochs=3, config=config, scheduler_of=reference)
    fit(model, task, config)
    torch.testing.assert_close(state(model), state(expected), rtol=1e-5, atol=1e-6)
    assert (state(model) - state(tiny.MLP())).abs().max() > 0.01


def test_a_constant_rate_rises_and_stays():
    task = tiny.VectorTask(sizes=(4,) * 5)
    config = TrainConfig(epochs=2, learning_rate=0.5, schedule="constant", warmup=0.3)
    rates = rates_of(lambda: fit(tiny.MLP(), task, config))
    assert rates == pytest.approx([0.125, 0.25, 0.375, *[0.5] * 7])


def test_the_cosine_rises_to_the_peak_and_falls_to_nearly_zero():
    task = tiny.VectorTask(sizes=(4,) * 5)
    config = TrainConfig(epochs=4, learning_rate=0.5, schedule="cosine", warmup=0.2)
    rates = rates_of(lambda: fit(tiny.MLP(), task, config))
    rise = [0.5 * i / 5 for i in (1, 2, 3, 4)]
    fall = [0.25 * (1 + math.cos(math.pi * i / 16)) for i in range(16)]
    assert rates == pytest.approx(rise + fall)


def test_every_epoch_has_its_mean_loss():
    losses = fit(tiny.MLP(), tiny.VectorTask(), TrainConfig(epochs=2))
    assert len(losses) == 2


def test_the_mean_loss_of_each_epoch_by_the_weight_of_batches_is_returned():
    config = TrainConfig(epochs=2, learning_rate=1e-12, weight_decay=0.0)
    task, model = tiny.VectorTask(sizes=(8, 1, 3)), tiny.MLP()
    expected = sum(len(batch[0]) * task.loss(model, batch).item() for batch in task.data) / 12
    assert fit(model, task, config) == pytest.approx([expected, expected], rel=1e-4)


class Weighed(tiny.VectorTask):
    """Its losses are means of what `weight` says, such as answer tokens."""

    def weight(self, batch):
        return {8: 3.0, 1: 40.0, 3: 0.5, 2: 7.0}[len(batch[0])]


@pytest.mark.parametrize("kind", [tiny.VectorTask, Weighed])
@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_an_accumulated_step_is_one_of_the_mean_over_all_its_batches(kind, accumulation):
    """Batches of 8 and 1 are not two halves of a step."""
    config = TrainConfig(epochs=1, learning_rate=0.1, weight_decay=0.0, accumulation=accumulation)
    task, ours, wanted = kind(sizes=(8, 1, 3, 2, 8)), tiny.MLP(), tiny.MLP()

    class Whole(tiny.VectorTask):
        """The same steps, each by one loss over everything that belongs to it."""

        def __init__(self):
            self.name = "whole"
            self.data = [task.data[at : at + accumulation] for at in range(0, 5, accumulation)]

        def weight(self, group):
            return 1.0

        def loss(self, model, group):
            weights = [float(task.weight(batch)) for batch in group]
            losses = [task.loss(model, batch) for batch in group]
            return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)

    fit(ours, task, config)
    fit(wanted, Whole(), TrainConfig(epochs=1, learning_rate=0.1, weight_decay=0.0))
    torch.testing.assert_close(state(ours), state(wanted), rtol=1e-4, atol=1e-6)


def test_a_step_whose_batches_have_no_weight_is_an_error():
    class Weightless(tiny.VectorTask):
        def weight(self, batch):
            return 0.0

    with pytest.raises(ValueError, match="'vectors': the batches of a step have no weight"):
        fit(tiny.MLP(), Weightless(), TrainConfig(epochs=1))


def test_training_lowers_the_loss():
    losses = fit(tiny.MLP(), tiny.VectorTask(), TrainConfig(epochs=20, learning_rate=0.01))
    assert losses[-1] < 0.5 * losses[0]


def test_accumulated_batches_train_as_one_large_batch():
    small, large = tiny.VectorTask(sizes=(4,) * 6), tiny.VectorTask(sizes=(12, 12))
    config = {"epochs": 3, "learning_rate": 0.01}
    accumulated, whole = tiny.MLP(), tiny.MLP()
    rates = rates_of(lambda: fit(accumulated, small, TrainConfig(accumulation=3, **config)))
    fit(whole, large, TrainConfig(**config))
    assert len(rates) == 6
    torch.testing.assert_close(state(accumulated), state(whole), rtol=1e-4, atol=1e-5)


def test_a_last_group_with_fewer_batches_is_a_step_of_its_own_with_its_own_mean():
    task, model = tiny.VectorTask(sizes=(4,) * 5), tiny.MLP()
    config = TrainConfig(epochs=2, learning_rate=0.01, accumulation=2)
    groups = [task.data[:2], task.data[2:4], task.data[4:]]
    expected = plain_loop(tiny.MLP(), groups, epochs=2, config=config, scheduler_of=one_cycle)
    rates = rates_of(lambda: fit(model, task, config))
    assert len(rates) == 6
    torch.testing.assert_close(state(model), state(expected), rtol=1e-4, atol=1e-5)


def test_a_data_loader_accumulates_as_a_list_does():
    model, same = tiny.MLP(), tiny.MLP()
    config = TrainConfig(epochs=2, learning_rate=0.01, accumulation=3)
    rates = rates_of(lambda: fit(model, LoaderTask(), config))
    assert len(rates) == 4
    task = tiny.VectorTask()
    loader = LoaderTask().loader
    task.data = [tuple(batch) for _ in range(2) for batch in loader]
    groups = [task.data[:3], task.data[3:4], task.data[4:7], task.data[7:]]
    expected = plain_loop(same, groups, epochs=1, config=config, scheduler_of=one_cycle)
    torch.testing.assert_close(state(model), state(expected), rtol=1e-4, atol=1e-5)


def test_only_what_requires_a_gradient_is_trained():
    model, fresh = tiny.MLP(), tiny.MLP()
    model.fc1.requires_grad_(False)
    fit(model, tiny.VectorTask(), TrainConfig(epochs=2, learning_rate=0.01))
    assert torch.equal(model.fc1.weight, fresh.fc1.weight)
    assert not torch.equal(model.fc2.weight, fresh.fc2.weight)


def test_a_model_without_anything_to_train_is_left_alone():
    model = tiny.MLP().requires_grad_(False)
    assert fit(model, tiny.VectorTask(), TrainConfig()) == []
    assert torch.equal(state(model), state(tiny.MLP()))


def test_a_penalty_is_added_to_the_loss_of_every_batch():
    def squares(model):
        return 0.3 * sum(parameter.square().sum() for parameter in model.parameters())

    class Penalised(tiny.VectorTask):
        def loss(self, model, batch):
            return super().loss(model, batch) + squares(model)

    config = TrainConfig(epochs=2, learning_rate=0.01)
    by_penalty, by_loss, without = tiny.MLP(), tiny.MLP(), tiny.MLP()
    losses = fit(by_penalty, tiny.VectorTask(), config, penalty=squares)
    assert losses == pytest.approx(fit(by_loss, Penalised(), config))
    fit(without, tiny.VectorTask(), config)
    torch.testing.assert_close(state(by_penalty), state(by_loss))
    assert (state(by_penalty) - state(without)).abs().max() > 1e-3


class Failing(tiny.VectorTask):
    """Loses its numbers at the fifth batch: the second of the second epoch."""

    def __init__(self, how):
        super().__init__(name="bad")
        self.how = how
        self.calls = 0

    def loss(self, model, batch):
        self.calls += 1
        loss = super().loss(model, batch)
        if self.calls < 5:
            return loss
        if self.how == "gradient":
            return loss + (next(model.parameters()).sum() * 0).sqrt()
        return loss * float(self.how)


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_and_names_task_epoch_and_batch(how):
    with pytest.raises(ValueError, match=rf"bad: epoch 2/3, batch 2: the loss is {how}.*learning_rate"):
        fit(tiny.MLP(), Failing(how), TrainConfig(epochs=3))


def test_a_gradient_that_is_no_number_stops_before_the_step():
    model = tiny.MLP()
    with pytest.raises(ValueError, match=r"bad: epoch 2/3, batch 2: the gradient is not finite.*learning_rate"):
        fit(model, Failing("gradient"), TrainConfig(epochs=3))
    assert torch.isfinite(state(model)).all()


def test_batches_without_a_length_ask_for_a_data_loader():
    class Endless(tiny.VectorTask):
        def batches(self):
            return iter(self.data)

    with pytest.raises(ValueError, match=r"'vectors': training needs the number of batches.*DataLoader"):
        fit(tiny.MLP(), Endless(), TrainConfig())


def test_no_batch_at_all_is_an_error():
    task = tiny.VectorTask()
    task.data = []
    with pytest.raises(ValueError, match="'vectors' has no training batch"):
        fit(tiny.MLP(), task, TrainConfig())


@pytest.mark.parametrize("how", ["fine", "nan"])
def test_every_module_gets_its_own_mode_back(how):
    class Watched(Failing):
        def loss(self, model, batch):
            seen.append([module.training for module in model.modules()])
            return super().loss(model, batch)

    seen = []
    model = nn.Sequential(tiny.MLP(), nn.Dropout(0.5)).eval()
    model[1].train()
    before = [module.training for module in model.modules()]
    if how == "fine":
        fit(model, Watched("1"), TrainConfig(epochs=2))
    else:
        with pytest.raises(ValueError, match="the loss is nan"):
            fit(model, Watched("nan"), TrainConfig(epochs=2))
    assert all(all(modes) for modes in seen)
    assert [module.training for module in model.modules()] == before
    assert before.count(True) == 1


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs():
    def trained(seed):
        seed_everything(seed)
        model = nn.Sequential(nn.Dropout(0.2), tiny.MLP())
        losses = fit(model, LoaderTask(order=seed), TrainConfig(epochs=2, learning_rate=0.01))
        return losses, state(model)

    (losses, first), (again, second), (other, third) = trained(1), trained(1), trained(2)
    assert losses == again
    assert torch.equal(first, second)
    assert losses != other
    assert not torch.equal(first, third)


def test_the_model_is_not_wrapped_afterwards():
    model = tiny.MLP()
    forward = model.forward.__func__
    fit(model, tiny.VectorTask(), TrainConfig(epochs=1, mixed_precision="bf16"))
    assert model.forward.__func__ is forward
    assert model(torch.zeros(1, 11)).dtype == torch.float32


def test_half_precision_trains_nearly_as_float32_and_in_any_order_with_it():
    best_device()
    config = TrainConfig(epochs=3, learning_rate=0.01)
    losses = {
        precision: fit(tiny.MLP(), tiny.VectorTask(), replace(config, mixed_precision=precision))
        for precision in ("no", "bf16")
    }
    again = fit(tiny.MLP(), tiny.VectorTask(), config)
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)
    assert again == losses["no"]


class Overflowing(tiny.VectorTask):
    """The gradient of one batch is finite, and is not once a loss scaler has scaled it."""

    def __init__(self, bad):
        super().__init__(sizes=(8,) * 6)
        self.bad = bad

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if not batch[0].equal(self.data[self.bad][0]):
            return loss
        steep = 1e35 * model.fc1.bias.sum()
        return loss + steep - steep.detach()


@pytest.mark.parametrize("bad", [2, 3])
def test_an_accumulated_step_that_a_scaler_skips_changes_neither_weights_nor_schedule(monkeypatch, bad):
    def scaled(precision):
        accelerator = Accelerator(mixed_precision="no")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return accelerator

    monkeypatch.setattr(trainer, "_accelerator", scaled)
    config = TrainConfig(epochs=1, accumulation=2, learning_rate=0.02, weight_decay=0.0)
    task, model = Overflowing(bad), tiny.MLP()
    rates = rates_of(lambda: fit(model, task, config))

    expected, plain = tiny.MLP(), tiny.VectorTask(sizes=(8,) * 6)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.02, weight_decay=0.0)
    scheduler = one_cycle(optimizer, 3)
    for group in (plain.data[:2], plain.data[4:]):  # The second step is skipped.
        optimizer.zero_grad()
        sum(F.cross_entropy(expected(x), y) / 2 for x, y in group).backward()
        optimizer.step()
        scheduler.step()
    assert len(rates) == 2
    torch.testing.assert_close(state(model), state(expected))


def test_progress_is_told_what_is_done_and_how_many_batches_there_are():
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        return items

    fit(tiny.MLP(), tiny.VectorTask(), TrainConfig(epochs=2), track=track)
    assert seen == [("vectors: epoch 1/2", 3), ("vectors: epoch 2/2", 3)]


# Batches in parts


class Recorded(ClassificationTask):
    """Notes how many images the model is shown at once."""

    seen: list

    def loss(self, model, batch):
        self.seen.append(len(batch["labels"]))
        return super().loss(model, batch)


class Broken(Recorded):
    """Has no finite loss on one part, counted from one."""

    broken: int

    def loss(self, model, batch):
        value = super().loss(model, batch)
        return value * math.nan if len(self.seen) == self.broken else value


def trained_by_parts(monkeypatch, size, *, method=None, penalty=lambda model: None, **changes):
    """Train an adapted CLIP on batches of 6 and a last one of 3 in parts of a size; return what was found."""
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", size * 3 * tiny.SIZE**2)
    task = tiny.classification_task()
    task.__class__, task.seen = Recorded, []
    method = method or KeepLoRA(KeepLoRAConfig(targets=("q_proj", "fc2"), rank=2, weight_energy=0.4))
    adapted = method.before_task(tiny.clip_model(), task)
    task.seen.clear()
    config = replace(TrainConfig(epochs=2, learning_rate=1e-2), **changes)
    losses = fit(adapted, method.training_task(adapted, task, 2), config, penalty=penalty)
    return losses, {name: b for name, (_, b) in lora.factors_of(adapted).items()}, task.seen


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"accumulation": 2}], ids=["every batch", "accumulated"])
@pytest.mark.parametrize("classifier", ["none", "cosine"])
def test_batches_in_parts_train_as_whole_ones(monkeypatch, changes, classifier):
    def weights(model):
        return 0.1 * sum((p**2).sum() for p in model.parameters() if p.requires_grad)

    options = KeepLoRAConfig(targets=("q_proj", "fc2"), rank=2, weight_energy=0.4, classifier=classifier)
    whole, cut = (
        trained_by_parts(monkeypatch, size, method=KeepLoRA(options), penalty=weights, **changes) for size in (100, 4)
    )
    assert set(whole[2]) == {6, 3}
    assert set(cut[2]) == {4, 2, 3}
    assert sum(whole[2]) == sum(cut[2])
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    assert any(b.abs().max() > 1e-3 for b in whole[1].values())
    for name, b in whole[1].items():
        torch.testing.assert_close(cut[1][name], b, rtol=1e-3, atol=1e-4)


def test_prompts_are_encoded_once_for_all_parts_of_a_batch(monkeypatch):
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", 2 * 3 * tiny.SIZE**2)
    model, task, calls = tiny.clip_model(), tiny.classification_task(), []
    task.__class__, task.seen = Recorded, []
    model.text_model.register_forward_hook(lambda *args: calls.append(1))
    fit(model, task, TrainConfig(epochs=1))
    assert sorted(task.seen) == [1, 2, 2, 2, 2, 2, 2, 2]
    assert len(calls) == len(list(task.batches())) == 3


def test_the_last_epoch_is_watched_by_parts_too(monkeypatch):
    def found(size):
        options = KeepLoRAConfig(targets=("q_proj", "fc2"), rank=2, weight_energy=0.4, features="last_epoch")
        monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", size * 3 * tiny.SIZE**2)
        method, task = KeepLoRA(options), tiny.classification_task()
        task.__class__, task.seen = Recorded, []
        adapted = method.before_task(tiny.clip_model(), task)
        training_task = method.training_task(adapted, task, 2)
        fit(adapted, training_task, TrainConfig(epochs=2, learning_rate=1e-9))
        assert max(task.seen) == min(size, 6)
        return grams_of(getattr(adapted, SEEN), task, torch.device("cpu"))

    whole, cut = found(100), found(4)
    assert whole
    for name, gram in whole.items():
        torch.testing.assert_close(cut[name], gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))


@pytest.mark.parametrize("is_adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("how", ["watched", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_model_that_something_stands_around_is_called_once_for_a_batch(monkeypatch, how, is_adapted):
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", 2 * 3 * tiny.SIZE**2)
    model, task, calls = tiny.clip_model(), tiny.classification_task(), []
    task.__class__, task.seen = Recorded, []
    if how == "watched":
        model.register_forward_hook(lambda *args: calls.append(1))
    else:
        model.compile(backend=lambda module, inputs: calls.append(1) or module)
    if is_adapted:
        model = LoRAFT(MethodConfig(targets=("q_proj",), rank=2)).before_task(model, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What the compiler's tracing warns of is its own.
        fit(model, task, TrainConfig(epochs=1))
    assert sorted(task.seen) == [3, 6, 6]
    assert calls


def test_a_training_that_was_cut_off_leaves_no_gradient_to_the_next(monkeypatch):
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", 4 * 3 * tiny.SIZE**2)
    trained = []
    for is_cut_off in (False, True):
        model, task = tiny.clip_model(), tiny.classification_task()
        if is_cut_off:
            task.__class__, task.seen, task.broken = Broken, [], 2
            with pytest.raises(LearningError):
                fit(model, task, TrainConfig(epochs=1))
            task = tiny.classification_task()
        fit(model, task, TrainConfig(epochs=1))
        trained.append(model.state_dict())
    assert all(value.equal(trained[1][name]) for name, value in trained[0].items())


def test_gradients_at_a_half_precision_leaf_add_up_in_float32():
    behind = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    one = DeferredGradient(behind * 1)
    for _ in range(1000):
        one.leaf.sum().backward()
        one.take()
    assert one.gradient.tolist() == [1000.0] * 3
    one.backward()
    torch.testing.assert_close(behind.grad, torch.full((3,), 1000.0).bfloat16())


def test_what_nobody_keeps_is_not_put_together(monkeypatch):
    monkeypatch.setattr(
        "keeplora.training.checkpoints.TrainingState._state", lambda self: pytest.fail("a state was made")
    )
    fit(tiny.MLP(), tiny.VectorTask(), TrainConfig(epochs=2))


def test_a_part_whose_loss_is_no_number_names_the_batch(monkeypatch):
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", 4 * 3 * tiny.SIZE**2)
    task = tiny.classification_task()
    task.__class__, task.seen, task.broken = Broken, [], 4
    model = tiny.clip_model()
    with pytest.raises(LearningError, match="epoch 1/2, batch 2: the loss is nan"):
        fit(model, task, TrainConfig(epochs=2))
    assert not task._is_frozen


def test_joint_training_encodes_the_prompts_of_a_batch_once(monkeypatch):
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", 2 * 3 * tiny.SIZE**2)
    union = Joint(MethodConfig()).schedule(
        [tiny.classification_task("first", 0), tiny.classification_task("second", 1)]
    )[0]
    model, calls = tiny.clip_model(), []
    model.text_model.register_forward_hook(lambda *args: calls.append(1))
    fit(model, union, TrainConfig(epochs=1))
    assert len(calls) == len(union.batches()) == 6


def test_a_penalty_without_a_gradient_counts_in_the_loss_and_changes_no_weight(monkeypatch):
    wanted = trained_by_parts(monkeypatch, 4)
    found = trained_by_parts(monkeypatch, 4, penalty=lambda model: torch.tensor(2.0))
    assert found[0] == pytest.approx([loss + 2 for loss in wanted[0]])
    assert all(b.equal(wanted[1][name]) for name, b in found[1].items())


def test_parts_without_examples_are_passed_over():
    class Cut(tiny.VectorTask):
        def micro_batches(self, batch):
            x, y = batch
            return [(x[:0], y[:0]), (x[:3], y[:3]), (x[3:], y[3:]), (x[:0], y[:0])]

    class Nothing(tiny.VectorTask):
        def micro_batches(self, batch):
            return []

    models = []
    for kind in (tiny.VectorTask, Cut, Nothing):
        models.append(tiny.MLP())
        fit(models[-1], kind(), TrainConfig(epochs=2, learning_rate=0.01))
    for model in models[1:]:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, models[0].state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 0, 5), (0, 8, 5), (8, 5, 0)])
def test_an_empty_batch_changes_nothing_and_alone_in_a_step_is_named(sizes):
    losses = {}
    for chosen in (sizes, tuple(size for size in sizes if size)):
        task = tiny.VectorTask(sizes=chosen)
        losses[chosen] = fit(tiny.MLP(), task, TrainConfig(epochs=2, learning_rate=0.01, accumulation=3))
    first, second = losses.values()
    assert first == pytest.approx(second, rel=1e-6)
    with pytest.raises(ValueError, match="the batches of a step have no weight; leave out what is empty"):
        fit(tiny.MLP(), tiny.VectorTask(sizes=sizes), TrainConfig(epochs=1, learning_rate=0.01))


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    """As torchrun starts them on a machine without GPUs, if nobody tells accelerate."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (best_device, lambda: fit(tiny.MLP(), tiny.VectorTask(), TrainConfig(epochs=1))):
        with pytest.raises(
            ValueError, match=r"2 processes were started, and accelerate takes part in 1: .*USE_CPU=true"
        ):
            call()
