"""The one pass of all statistics: what it sees is what autograd says, whatever the model does."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from keeplora.layers.fisher import fisher_diagonals
from keeplora.layers.gradients import SketchedGradient, mean_gradients
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.statistics import ExactGradient, InputCovariance, SquaredGradient, collect
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.subspace.gradient_sketch import GradientSketch
from keeplora.task import Task
from tiny import MLP, VectorTask, autograd_gradients

LAYERS = ["fc1", "fc2", "out"]


class Twice(MLP):
    """Runs one layer twice for every batch."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(17, 17)
        self.out = nn.Linear(17, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.fc2(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))


class InPlace(MLP):
    """Changes the outputs of its layers in place."""

    def forward(self, x):
        return self.out(self.fc2(self.fc1(x).relu_()).relu_())


class Checkpointed(MLP):
    """Computes its hidden layers anew in the backward pass."""

    def forward(self, x):
        hidden = lambda rows: torch.tanh(self.fc2(torch.tanh(self.fc1(rows))))  # noqa: E731
        return self.out(checkpoint(hidden, x, use_reentrant=False))


class ByKeyword(MLP):
    """Calls its layers with the name of their argument."""

    def forward(self, x):
        return self.out(input=torch.tanh(self.fc2(input=torch.tanh(self.fc1(input=x)))))


class Hooked(MLP):
    """Has a hook that changes what a layer puts out."""

    def __init__(self):
        super().__init__()
        self.fc2.register_forward_hook(lambda module, args, output: 2 * output)


class Taught(VectorTask):
    """Compares with what the model itself says of other data, as a teacher: no gradient goes there."""

    def loss(self, model, batch):
        with torch.no_grad():
            teacher = model(batch[0].flip(1)).softmax(1)
        return super().loss(model, batch) + ((model(batch[0]) - teacher) ** 2).mean()


class Asking(VectorTask):
    """Differentiates on its own while the loss is computed."""

    def loss(self, model, batch):
        inputs = batch[0].clone().requires_grad_()
        torch.autograd.grad(super().loss(model, (inputs, batch[1])), [inputs])
        return super().loss(model, batch)


class Weighed(VectorTask):
    """Its losses are means of something else than the rows."""

    def weight(self, batch):
        return 0.5 * len(batch[0]) ** 2


def close(ours, wanted, tolerance=1e-5):
    scale = float(wanted.abs().max())
    assert scale > 0
    torch.testing.assert_close(ours.double(), wanted.double(), atol=tolerance * scale, rtol=0)


MODELS = [MLP, Twice, InPlace, Checkpointed, ByKeyword, Hooked]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("make_task", [VectorTask, Taught, Asking, Weighed])
def test_the_exact_gradient_is_autograds(build, make_task):
    found = mean_gradients(build(), make_task(), LAYERS)
    for name, wanted in autograd_gradients(build(), make_task(), LAYERS).items():
        close(found[name], wanted)


@pytest.mark.parametrize("build", MODELS)
def test_the_squared_gradient_of_a_batch_is_that_of_all_calls_of_a_layer(build):
    task = VectorTask(sizes=(7, 3))
    found = fisher_diagonals(build(), task, LAYERS)
    for name in LAYERS:
        wanted = 0.0
        for rows, labels in task.data:
            one = VectorTask()
            one.data = [(rows, labels)]
            wanted = wanted + len(rows) ** 2 * autograd_gradients(build(), one, [name])[name] ** 2 / 10
        close(found[name], wanted)


@pytest.mark.parametrize("build", [MLP, InPlace, Checkpointed, ByKeyword, Hooked])
def test_several_statistics_share_one_pass(build):
    """Inputs are counted once, though a checkpoint runs a layer again in the backward pass."""
    task, model = VectorTask(), build()
    sketch = {name: GradientSketch(model.get_submodule(name).out_features,
                                   torch.zeros(model.get_submodule(name).in_features, 0), 2, seed=0)
              for name in LAYERS}  # fmt: skip
    own = {}
    for name in LAYERS:
        zeros = torch.zeros_like(model.get_submodule(name).weight)
        own[name] = [ExactGradient(zeros.detach().clone()), SquaredGradient(zeros.detach().clone()),
                     InputCovariance(), SketchedGradient(sketch[name])]  # fmt: skip
    watcher = collect(model, task, own, what="everything")
    exact, fisher, grams = (one(build(), task, LAYERS) for one in (mean_gradients, fisher_diagonals, input_grams))
    for name in LAYERS:
        close(own[name][0].result() / watcher.total_weight, exact[name])
        close(own[name][1].result() / watcher.total_weight, fisher[name])
        close(own[name][2].result(), grams[name])
        close(sketch[name].range, exact[name] * watcher.total_weight @ sketch[name].right)


def test_layers_may_be_taken_in_groups():
    whole = mean_gradients(tiny.clip_model(), tiny.classification_task(), NAMES)
    for group in (NAMES[:3], NAMES[3:]):
        for name, found in mean_gradients(tiny.clip_model(), tiny.classification_task(), group).items():
            close(found, whole[name])


NAMES = [f"{tower}_model.encoder.layers.{i}.self_attn.{part}_proj"
         for tower in ("text", "vision") for i in (0, 1) for part in ("q", "out")]  # fmt: skip


def test_the_gradient_of_frozen_half_precision_layers_is_summed_in_float32():
    model, task = MLP().to(torch.bfloat16).requires_grad_(False), VectorTask()
    task.data = [(rows.to(torch.bfloat16), labels) for rows, labels in task.data]
    found = mean_gradients(model, task, LAYERS)
    exact = deepcopy(model).float()
    floats = VectorTask()
    floats.data = [(rows.float(), labels) for rows, labels in task.data]
    for name, wanted in autograd_gradients(exact, floats, LAYERS).items():
        assert found[name].dtype == torch.float32
        close(found[name], wanted, tolerance=0.03)


class Odd(nn.Module):
    """Has everything that training mode makes random or changes."""

    def __init__(self, rate):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(11, 17), nn.Linear(17, 5)
        self.norm, self.drop, self.attention_dropout = nn.BatchNorm1d(17), nn.Dropout(rate), rate

    def forward(self, x):
        hidden = self.drop(self.norm(self.fc1(x)))
        return self.fc2(F.dropout(torch.tanh(hidden), self.attention_dropout, self.training))


@pytest.mark.parametrize("collecting", [mean_gradients, fisher_diagonals, input_grams])
def test_dropout_is_off_and_running_statistics_stay_though_the_model_trains(collecting):
    model = Odd(0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collecting(model, VectorTask(), ["fc1", "fc2"])
    wanted = collecting(Odd(0.0), VectorTask(), ["fc1", "fc2"])
    for name in ("fc1", "fc2"):
        close(found[name], wanted[name])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert (model.attention_dropout, model.training, model.drop.training, model.norm.training) == (
        0.5,
        True,
        True,
        True,
    )


def test_an_attention_that_hands_its_dropout_to_a_function_drops_nothing():
    def build(rate):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=2, attention_dropout=rate))

    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    dropping, plain = (mean_gradients(build(rate).train(), tiny.TokenTask(), names) for rate in (0.5, 0.0))
    for name in names:
        close(dropping[name], plain[name])


# Padding


class Silent:
    """A language task that says nothing of its padding: a plain object with a name, batches and a loss."""

    def __init__(self, padding):
        self.name = "silent"
        self.data = [
            {key: F.pad(value, (0, padding)) for key, value in batch.items()} for batch in tiny.TokenTask().data
        ]

    def batches(self):
        return self.data

    def loss(self, model, batch):
        return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def test_padding_is_taken_from_the_batch_where_a_task_says_nothing():
    model, names = tiny.llama_model(), ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    exact = input_grams(model, tiny.TokenTask(), names)
    for padding in (0, 9):
        for name, gram in input_grams(model, Silent(padding), names).items():
            close(gram, exact[name])


def test_a_mask_that_does_not_fit_a_layers_rows_is_refused_and_not_ignored():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = tiny.llama_model()
            self.head = nn.Linear(self.llama.config.hidden_size, 3)

        def forward(self, **batch):
            return self.head(self.llama.model(**batch).last_hidden_state[:, -1])

    class Pooled(Silent):
        def loss(self, model, batch):
            return model(**batch).square().mean()

    with pytest.raises(ValueError, match=r"padding_mask\('head'\) has shape \(4, 7\).*override padding_mask"):
        input_grams(Flat(), Pooled(0), ["head"])


# What the pass takes


LLAMA = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip


def saved_bytes(function):
    """Return the bytes that autograd keeps for backward passes while a function runs: the most at one time."""
    alive, now, most = {}, 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            alive[self.key] = alive.get(self.key, 0) + 1
            if alive[self.key] == 1:
                now += tensor.untyped_storage().nbytes()
                most = max(most, now)

        def __del__(self):
            nonlocal now
            alive[self.key] -= 1
            if not alive[self.key]:
                now -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        function()
    return most


class Words(Task):
    name = "words"

    def __init__(self, length):
        ids = torch.randint(3, 40, (2, length), generator=torch.Generator().manual_seed(0))
        self.data = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]

    def batches(self):
        return self.data

    def loss(self, model, batch):
        return model(**batch).loss


def checkpointing(model, change, *arguments):
    """Switch a model's activation checkpointing by the name that this release of transformers has for it."""
    names = (f"activation_checkpointing_{change}", f"gradient_checkpointing_{change}")
    next(getattr(model, name) for name in names if hasattr(model, name))(*arguments)


def test_the_gradient_pass_of_a_checkpointed_model_keeps_no_more_than_its_training_step():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=4))
    checkpointing(model, "enable")
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
    task = Words(48)

    def step():
        model.train()
        task.loss(model, task.data[0]).backward()
        model.zero_grad()

    trained = saved_bytes(step)
    collected = saved_bytes(lambda: mean_gradients(model.eval(), task, names))
    checkpointing(model, "disable")
    unchecked = saved_bytes(step)
    assert collected <= 1.1 * trained < 0.5 * unchecked
    plain = mean_gradients(model, task, names)
    checkpointing(model, "enable")
    for name, found in mean_gradients(model, task, names).items():
        close(found, plain[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_trainer_may_recompute_the_activations_of_an_adapted_model(use_reentrant):
    """A frozen A and an input without a gradient once left B without one (a known failure of checkpoints with PEFT)."""

    def gradients(is_checkpointed):
        config = KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.8, targets=("q_proj", "v_proj"))
        task, method = tiny.TokenTask(), KeepLoRA(config)
        adapted = method.before_task(tiny.llama_model(), task).train()
        if is_checkpointed:
            checkpointing(adapted.base_model.model, "enable", {"use_reentrant": use_reentrant})
        task.loss(adapted, task.data[0]).backward()
        return [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]

    plain, found = gradients(False), gradients(True)
    assert len(plain) == len(found) == 4
    for one, other in zip(plain, found, strict=True):
        close(other, one)
        assert one.any()
