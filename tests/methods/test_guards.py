"""What methods refuse before anything is trained, how they give a model back, and what is a task to them."""

import dataclasses

import pytest
import torch
from torch import nn

import tiny
from keeplora import KeepLoRA, KeepLoRAConfig, LoRAFT, MethodConfig, TrainConfig, fit
from keeplora.errors import LearningError
from keeplora.layers import lora, merging
from keeplora.methods.registry import METHODS
from tiny import MLP, TokenTask, VectorTask, llama_model, train

NAMES = ("fc1", "fc2", "out")


def method_for(name, **options):
    kind = METHODS[name].Config
    options = {"rank": 2, "targets": NAMES, "weight_energy": 0.4, "feature_energy": 0.6, **options}
    known = {field.name for field in dataclasses.fields(kind)}
    return METHODS[name](kind(**{key: value for key, value in options.items() if key in known}))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    assert list(model.state_dict()) == list(before)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


# Interrupted tasks


@pytest.mark.parametrize("name", METHODS)
def test_an_abandoned_task_leaves_the_model_as_it_was_and_it_can_be_learned_anew(name):
    first, second = VectorTask("first", 0), VectorTask("second", 1)
    method, straight = (method_for(name) for _ in range(2))
    models = []
    for one, is_interrupted in ((method, True), (straight, False)):
        torch.manual_seed(3)
        model = MLP()
        model.fc1.bias.requires_grad_(False)
        for task in (first, second):
            if is_interrupted:
                before, flags = state(model), [p.requires_grad for p in model.parameters()]
                outputs = model(task.data[0][0]).detach()
                random = torch.get_rng_state()
                adapted = one.before_task(model, task)
                train(one.training_task(adapted, task, 1) and adapted, task, epochs=1)
                model = one.abandon(adapted)
                torch.set_rng_state(random)
                same(model, before)
                assert [p.requires_grad for p in model.parameters()] == flags
                assert model(task.data[0][0]).equal(outputs)
                assert type(model) is MLP
            adapted = one.before_task(model, task)
            train(adapted, task)
            model = one.after_task(adapted, task)
        models.append(model)
    same(models[0], state(models[1]))


@pytest.mark.parametrize("options", [{"b_start": "gradient"}, {"features": "last_epoch"}, {"a_training": "trained"}])
def test_every_option_of_keeplora_can_be_abandoned(options):
    method, model, task = method_for("keeplora", **options), MLP(), VectorTask()
    before = state(model)
    adapted = method.before_task(model, task)
    train(method.training_task(adapted, task, 2) and adapted, task, epochs=1)
    same(method.abandon(adapted), before)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].has_settings])
def test_a_model_that_has_an_adapter_is_refused_before_anything_is_trained(name):
    """A cell of a notebook was interrupted, and the next one begins with the model again."""
    method, model, task = method_for(name), MLP(), VectorTask()
    adapted = method.before_task(model, task)
    for given in (model, adapted):
        with pytest.raises(
            ValueError, match=r"3 layers with an adapter, '.*fc1' first.*model = method\.abandon\(adapted\)"
        ):
            method.before_task(given, task)
    model = method.abandon(adapted)
    model = method.after_task(method.before_task(model, task), task)
    assert type(model) is MLP


# Shared weights


class Tied(MLP):
    """Two linear layers have one weight."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(11, 17)
        self.spare.weight = self.fc1.weight


class TiedTable(MLP):
    """A linear layer has the weight of an embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(17, 11)
        self.fc1.weight = self.table.weight


class TwoNames(MLP):
    """One layer is in two places."""

    def __init__(self):
        super().__init__()
        self.again = self.fc1


class SameMemory(MLP):
    """Two parameters are views of one memory."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(11, 17)
        self.spare.weight = nn.Parameter(self.fc1.weight.data)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].has_settings])
@pytest.mark.parametrize(
    ("build", "other"),
    [(Tied, "spare.weight"), (TiedTable, "table.weight"), (TwoNames, "again.weight"), (SameMemory, "spare.weight")],
)
def test_a_shared_weight_is_refused_before_training_with_both_owners(name, build, other):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=rf"layer 'fc1' shares its weight with '{other}'"):
        method_for(name).before_task(model, VectorTask())
    same(model, before)


def test_a_tied_head_is_refused_and_an_untied_target_beside_it_is_not():
    model = llama_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'model.embed_tokens.weight'"):
        LoRAFT(MethodConfig(targets=("lm_head",))).before_task(model, TokenTask())
    assert LoRAFT(MethodConfig(rank=2)).before_task(model, TokenTask())


# Tasks and models without anything said


class Plain:
    """A task as the README has it: a name, batches and a loss."""

    def __init__(self, name, seed):
        self.name, self.data = name, VectorTask(seed=seed).data

    def batches(self):
        return self.data

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_plain_object_with_a_name_batches_and_a_loss_is_a_task(name):
    models = []
    for make in (Plain, VectorTask):
        torch.manual_seed(0)
        method, model = method_for(name), MLP()
        for seed in (0, 1):
            task = make(f"task{seed}", seed)
            adapted = method.before_task(model, task)
            watched = method.training_task(adapted, task, 2)
            fit(adapted, watched, TrainConfig(epochs=2, learning_rate=0.01), penalty=method.penalty)
            model = method.after_task(adapted, task)
        models.append(model)
    same(models[0], state(models[1]))


def test_a_plain_object_may_say_more_and_one_that_says_less_is_refused():
    class Weighed(Plain):
        def weight(self, batch):
            return 1.0

    class Nameless:
        def batches(self):
            return []

    method = method_for("keeplora", features="last_epoch")
    adapted = method.before_task(MLP(), Weighed("weighed", 0))
    fit(adapted, method.training_task(adapted, Weighed("weighed", 0), 2), TrainConfig(epochs=2, learning_rate=0.01))
    assert method.after_task(adapted, Weighed("weighed", 0))
    with pytest.raises(ValueError, match=r"is no task: it has no name; a task has name, batches\(\) and loss"):
        method_for("keeplora").before_task(MLP(), Nameless())


def test_the_default_configuration_works_on_a_model_without_towers():
    method, model = KeepLoRA(), llama_model()
    for seed in (0, 1):
        task = TokenTask(f"task{seed}", seed)
        adapted = method.before_task(model, task)
        train(adapted, task)
        model = method.after_task(adapted, task)
    weight = llama_model().model.layers[1].self_attn.q_proj.weight.detach().double()
    energies = torch.linalg.svdvals(weight) ** 2
    basis = KeepLoRA()
    basis.protect(llama_model())
    covered = float((weight @ basis.bases["model.layers.1.self_attn.q_proj"].double()).square().sum() / energies.sum())
    assert 0.6 <= covered < 0.6 + float(energies[0] / energies.sum())
    # The default update is small (alpha / rank is 1 / 16), and the weights are as coarse as float32 is.
    assert all(layer.leak < 1e-6 + layer.merge_loss < 0.05 for layer in method.record.certificate.values())


def test_towers_that_are_named_leave_no_layer_out_silently():
    with pytest.raises(
        ValueError, match=r"layer 'model.*q_proj' is in none of the towers vision of weight_energy; add"
    ):
        KeepLoRA(KeepLoRAConfig(weight_energy={"vision": 0.5})).before_task(llama_model(), TokenTask())


# The merge


@pytest.mark.parametrize("share", [0.99, 1.01, 0.0, -1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_merge_that_adds_another_update_is_refused_however_small_the_update(share, size, monkeypatch):
    """A check that is a million times too lax would let a hundredth of the update pass."""
    model, task = MLP(), VectorTask()
    method = method_for("lora_ft", alpha=2.0)
    adapted = method.before_task(model, task)
    with torch.no_grad():
        for layer in lora.lora_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(std=size)
    merge = merging.merge

    def wrong(adapted):
        for layer in lora.lora_layers(adapted).values():
            layer.scaling["default"] *= share
        return merge(adapted)

    monkeypatch.setattr(merging, "merge", wrong)
    with pytest.raises(LearningError, match=r"task 'vectors': merging changed what layer 'fc1' computes by"):
        method.after_task(adapted, task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_right_merge_passes_in_every_precision_and_its_error_is_relative_to_the_update(dtype):
    model, task = MLP().to(dtype), VectorTask()
    task.data = [(rows.to(dtype), labels) for rows, labels in task.data]
    method = method_for("lora_ft", alpha=2.0, updates="merged")
    adapted = method.before_task(model, task)
    with torch.no_grad():
        for layer in lora.lora_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(std=0.5)
    method.after_task(adapted, task)
    assert 0 < method.record.merge_error < 64 * torch.finfo(dtype).eps


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["keeplora", "inflora", "lora_ft"])
def test_the_certificate_is_of_the_weights_and_a_merge_that_loses_the_update_is_refused(name, dtype, size):
    """In half precision, rounding eats a small update, and puts what it leaves into the protected subspace."""
    model, task = MLP().to(dtype), VectorTask()
    task.data = [(rows.to(dtype), labels) for rows, labels in task.data]
    method = method_for(name, alpha=2.0, updates="merged")
    before = state(model)
    adapted = method.before_task(model, task)
    protected = {layer: basis.double() for layer, basis in method.protected().items()}
    with torch.no_grad():
        for layer in lora.lora_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(std=size)
    updates = {layer: b.double() @ a.double() for layer, (a, b) in lora.factors_of(adapted).items()}
    trained = state(adapted)
    is_coarse = dtype in (torch.bfloat16, torch.float16) and size < 0.1
    if is_coarse:
        with pytest.raises(LearningError, match=r"would lose \d+% of the update .* Let it stay beside the weights"):
            method.after_task(adapted, task)
        same(adapted, trained)  # Nothing was merged, nothing is lost.
        method.config = dataclasses.replace(method.config, allow_merge_loss=True)
    merged = method.after_task(adapted, task)
    lost = size_of_all = 0.0
    for layer, update in updates.items():
        change = merged.get_submodule(layer).weight.detach().double() - before[f"{layer}.weight"].double()
        lost += float((change - update).norm() ** 2)
        size_of_all += float(update.norm() ** 2)
        if protected:
            certificate = method.record.certificate[layer]
            leak = float((change @ protected[layer]).norm() / change.norm()) if change.any() else 0.0
            assert certificate.leak == pytest.approx(leak, rel=1e-3, abs=1e-6)
            assert certificate.merge_loss == pytest.approx(
                float((change - update).norm() / update.norm()), rel=1e-3, abs=1e-6
            )
    assert method.record.merge_loss == pytest.approx((lost / size_of_all) ** 0.5, rel=1e-3, abs=1e-6)
    assert is_coarse == (method.record.merge_loss > merging.MERGE_LOSS_ALLOWED)


def test_a_merge_reads_no_outputs_of_the_model():
    class Counting(VectorTask):
        num_losses = 0

        def loss(self, model, batch):
            self.num_losses += 1
            return super().loss(model, batch)

        def outputs(self, model, batch):
            raise AssertionError("outputs may be gigabytes")

    task, method = Counting(), method_for("lora_ft")
    adapted = method.before_task(MLP(), task)
    method.after_task(adapted, task)
    assert task.num_losses == 1, "whether the merged model's loss is finite"


@pytest.mark.parametrize("change", [1e-7, 1.0])
def test_a_change_of_any_frozen_weight_is_seen_however_small(change):
    """Of one entry, in a parameter that is no target; and one that leaves every sum of a row as it was."""
    for alter in (
        lambda model: model.fc2.bias[3].add_(change),
        lambda model: model.fc2.base_layer.weight.copy_(model.fc2.base_layer.weight[:, torch.randperm(17)]),
        lambda model: model.norm.weight[:2].copy_(model.norm.weight[:2].flip(0)),
    ):
        model, task, method = MLP(), VectorTask(), method_for("lora_ft", targets=("fc1", "fc2"))
        model.norm = nn.LayerNorm(6)
        nn.init.normal_(model.norm.weight)
        adapted = method.before_task(model, task)
        with torch.no_grad():
            alter(lora.inner(adapted))
        with pytest.raises(
            ValueError, match=r"the weight '(fc2\.(bias|weight)|norm\.weight)' of the base model was changed"
        ):
            method.after_task(adapted, task)


def test_principal_subspaces_are_not_computed_where_nobody_asks(monkeypatch):
    method = method_for("keeplora")
    adapted = method.before_task(MLP(), VectorTask())
    method.after_task(adapted, VectorTask())
    monkeypatch.setattr("keeplora.methods.keeplora.protected.principal_bases", lambda *args: pytest.fail("computed"))
    assert method_for("keeplora").protected() == {}
    assert tiny.MLP() is not None


def test_protecting_every_input_is_refused_since_nothing_could_be_learned_after_one_task():
    with pytest.raises(ValueError, match=r"feature_energy = 1\.0 protects all that the first task's inputs reach"):
        KeepLoRAConfig(feature_energy=1.0)


def integer(layer):
    layer.weight = nn.Parameter(layer.weight.detach().mul(10).to(torch.int8), requires_grad=False)


COMPUTED = "has a weight that is computed from something else, which takes no update"
ODD_WEIGHTS = {
    "integers": (integer, "has a weight of torch.int8, which takes no update"),
    "weight norm": (torch.nn.utils.parametrizations.weight_norm, COMPUTED),
    "spectral norm": (
        torch.nn.utils.parametrizations.spectral_norm,
        COMPUTED,
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_weights_that_take_no_update_are_refused_before_training(name, kind):
    model, (change, words) = MLP(), ODD_WEIGHTS[kind]
    change(model.fc2)
    if name == "zero_shot":
        return
    with pytest.raises(ValueError, match=rf"layer 'fc2' {words}; leave it out of targets"):
        method_for(name).before_task(model, VectorTask())
    if kind != "integers":  # They cannot run either.
        method_for(name, targets=("fc1", "out")).before_task(model, VectorTask())


@pytest.mark.parametrize("options", [{"weight_side": "output"}, {"weight_energy": {"fc1": 0.4}}])
def test_what_cannot_be_protected_is_refused_again_at_the_next_attempt(options):
    """A half of the layers would pass for all of them."""
    model = MLP()
    model.fc1 = nn.Linear(11, 11)
    method = KeepLoRA(KeepLoRAConfig(**{"rank": 2, "targets": NAMES, "weight_energy": 0.4, **options}))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"needs square layers|in none of the towers"):
            method.before_task(model, VectorTask())
