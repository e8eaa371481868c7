import math
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from keeplora.layers.fisher import fisher_diagonals
from keeplora.layers.gradients import averages, mean_gradients
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.statistics import ExactGradient, SquaredGradient
from keeplora.progress import silent
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace.protected import new_directions, principal_bases
from keeplora.training.state_file import from_bytes
from tiny import MLP, TokenTask, VectorTask, classification_task, clip_model, llama_model, siglip_model, to_bytes

LAYERS = ["fc1", "fc2", "out"]
SELF_ATTENTION = "model.layers.{}.self_attn.{}_proj"


def gradients_one_by_one(model, task, batches, layers):
    """Average, in float64, the gradients of one example at a time."""
    model = deepcopy(model).double()
    sums, count = dict.fromkeys(layers, 0.0), 0
    for rows, labels in batches:
        for row, label in zip(rows.double(), labels, strict=True):
            model.zero_grad()
            task.loss(model, (row.unsqueeze(0), label.unsqueeze(0))).backward()
            sums = {name: total + model.get_submodule(name).weight.grad for name, total in sums.items()}
            count += 1
    return {name: total / count for name, total in sums.items()}


def mlp_inputs(model, rows):
    """Return the inputs of the three layers, in float64."""
    model, rows = deepcopy(model).double(), rows.double()
    with torch.no_grad():
        first = torch.tanh(model.fc1(rows))
        return {"fc1": rows, "fc2": first, "out": torch.tanh(model.fc2(first))}


def close(ours, wanted, tolerance=1e-5):
    scale = float(wanted.abs().max())
    torch.testing.assert_close(ours.double(), wanted.double(), atol=tolerance * scale, rtol=0)


def borrowed(model):
    """Everything that a pass may change and has to give back."""
    return (
        [(name, p.requires_grad, p.grad is None, bool(p._backward_hooks)) for name, p in model.named_parameters()],
        [(name, module.training, len(module._forward_pre_hooks)) for name, module in model.named_modules()],
    )


def odd_model():
    """A model whose flags are all mixed up."""
    model = MLP().train()
    model.fc2.eval()
    model.fc1.weight.requires_grad_(False)
    model.out.bias.requires_grad_(False)
    model.fc1.register_forward_pre_hook(lambda module, args: None)
    return model


class Failing(VectorTask):
    def loss(self, model, batch):
        if batch[0].equal(self.data[1][0]):
            raise RuntimeError("a user's own error")
        return super().loss(model, batch)


class Watching(VectorTask):
    """Notes what requires a gradient, and the mode, while a batch runs."""

    def loss(self, model, batch):
        self.required = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.training = [module.training for module in model.modules()]
        return super().loss(model, batch)


# Gradients


def test_gradient_is_the_mean_over_examples_whatever_the_batch_sizes():
    model, task = MLP(), VectorTask(sizes=(9, 4, 1, 6))
    gradients = mean_gradients(model, task, LAYERS)
    for name, wanted in gradients_one_by_one(model, task, task.data, LAYERS).items():
        assert gradients[name].shape == model.get_submodule(name).weight.shape
        assert gradients[name].dtype == torch.float32
        close(gradients[name], wanted)


def test_no_weight_requires_a_gradient_and_the_model_is_in_training_mode():
    model, task = odd_model(), Watching()
    assert list(mean_gradients(model, task, ["fc2"])) == ["fc2"]
    assert task.required == []
    assert all(task.training)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("collect", [mean_gradients, input_grams, fisher_diagonals])
def test_flags_modes_and_hooks_are_given_back(collect):
    model = odd_model()
    before = borrowed(model)
    collect(model, VectorTask(), LAYERS)
    assert borrowed(model) == before


@pytest.mark.parametrize("collect", [mean_gradients, input_grams, fisher_diagonals])
def test_flags_modes_and_hooks_are_given_back_after_an_error(collect):
    model = odd_model()
    before = borrowed(model)
    with pytest.raises(RuntimeError, match="a user's own error"):
        collect(model, Failing(), LAYERS)
    assert borrowed(model) == before


@pytest.mark.parametrize("kind", [ExactGradient, SquaredGradient])
def test_no_two_gradients_of_a_batch_are_held_at_once(kind, monkeypatch):
    held, most = {}, []

    class Watched(kind):
        def add(self, inputs, output_gradients, weight):
            super().add(inputs, output_gradients, weight)
            held[id(self)] = getattr(self, "_of_batch", None) is not None
            most.append(sum(held.values()))

        def end_batch(self):
            super().end_batch()
            held[id(self)] = False

    averages(Watched, MLP(), VectorTask(), LAYERS, share=1.0, track=silent)
    assert len(most) == len(LAYERS) * len(VectorTask().data)
    assert max(most) <= 1


class Twice(torch.nn.Module):
    """A model that uses one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.fc, self.tied, self.out = torch.nn.Linear(11, 7), torch.nn.Linear(11, 7), torch.nn.Linear(7, 5)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)) + torch.tanh(self.tied(x.flip(1))))


@pytest.mark.parametrize("collect", [mean_gradients, fisher_diagonals])
def test_layers_that_share_a_weight_both_get_what_is_found_of_it(collect):
    model, task = Twice(), VectorTask(sizes=(1, 1, 1))
    wanted = 0.0
    for batch in task.data:
        (gradient,) = torch.autograd.grad(task.loss(model, batch), [model.fc.weight])
        wanted = wanted + (gradient if collect is mean_gradients else gradient**2) / len(task.data)
    found = collect(model, task, ["fc", "tied", "out"])
    close(found["fc"], wanted)
    assert found["tied"].equal(found["fc"])


@pytest.mark.parametrize(
    "extra",
    [
        lambda model, loss: loss + (model.fc1.weight**2).sum(),
        lambda model, loss: loss + torch.cat([model.out.weight.flatten(), model.fc1.weight.flatten()]).norm(),
        lambda model, loss: loss + torch.nn.functional.linear(torch.ones(2, 17), weight=model.fc2.weight).sum(),
        lambda model, loss: loss + model.fc1.weight.T.sum(),
    ],
)
def test_a_loss_that_uses_a_weight_past_its_layer_is_refused(extra):
    class Penalised(VectorTask):
        def loss(self, model, batch):
            return extra(model, super().loss(model, batch))

    for collect in (mean_gradients, fisher_diagonals):
        with pytest.raises(ValueError, match=r"'vectors': its loss uses the weight of layer '\w+' past the layer"):
            collect(MLP(), Penalised(sizes=(9, 4)), LAYERS)


def test_what_a_loss_does_with_a_weight_without_a_gradient_is_no_use_of_it():
    class Harmless(VectorTask):
        def loss(self, model, batch):
            with torch.no_grad():
                scale = model.fc1.weight.norm()
            assert model.fc1.weight.dtype == torch.float32
            return super().loss(model, batch) + 0 * (
                scale + model.fc2.weight.detach().sum() + len(model.out.weight.data)
            )

    found, wanted = (mean_gradients(MLP(), task, LAYERS) for task in (Harmless(), VectorTask()))
    for name in LAYERS:
        close(found[name], wanted[name])


def test_a_loss_with_second_derivatives_is_refused():
    class Smooth(VectorTask):
        def loss(self, model, batch):
            inputs = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(super().loss(model, (inputs, batch[1])), [inputs], create_graph=True)
            return (gradient**2).sum()

    with pytest.raises(ValueError, match="'vectors': its loss takes second derivatives"):
        mean_gradients(MLP(), Smooth(), LAYERS)


def test_a_task_leaves_its_frozen_state_after_an_error():
    class Frozen(Failing):
        inside = False

        @contextmanager
        def frozen(self, model):
            self.inside = True
            try:
                yield
            finally:
                self.inside = False

    task = Frozen()
    with pytest.raises(RuntimeError, match="a user's own error"):
        input_grams(MLP(), task, LAYERS)
    assert not task.inside


def test_a_layer_that_no_gradient_reaches_gets_zero():
    model = MLP()
    model.spare = torch.nn.Linear(3, 4)
    gradients = mean_gradients(model, VectorTask(), ["fc2", "spare"])
    assert gradients["spare"].equal(torch.zeros(4, 3))
    assert gradients["fc2"].abs().max() > 0


def test_a_loss_that_is_not_finite_names_the_task():
    task = VectorTask("broken")
    task.data[1][0][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'broken'.*loss.*nan"):
        mean_gradients(MLP(), task, LAYERS)


def test_a_gradient_that_is_not_finite_names_task_and_layer():
    class Steep(VectorTask):
        def loss(self, model, batch):
            return super().loss(model, batch) + (model.fc2(torch.ones(1, 17)) * 0).sum().sqrt()

    with pytest.raises(ValueError, match=r"'steep'.*'fc2'"):
        mean_gradients(MLP(), Steep("steep"), LAYERS)


def test_inputs_that_are_not_finite_name_task_and_layer():
    task = VectorTask("broken")
    task.data[0][0][0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'broken'.*'fc1'"):
        input_grams(MLP(), task, LAYERS)


@pytest.mark.parametrize(("share", "num_batches"), [(0.1, 1), (0.3, 2), (0.41, 3), (0.8, 4), (1.0, 5)])
def test_a_share_of_the_batches_is_rounded_up(share, num_batches):
    model, task = MLP(), VectorTask(sizes=(5, 3, 4, 6, 2))
    gradients = mean_gradients(model, task, ["fc2"], share=share)
    close(gradients["fc2"], gradients_one_by_one(model, task, task.data[:num_batches], ["fc2"])["fc2"])


@pytest.mark.parametrize(("share", "total", "wanted"), [(0.07, 100, 7), (0.55, 100, 55), (0.071, 100, 8)])
def test_a_share_is_not_rounded_up_by_the_error_of_its_product(share, total, wanted):
    class Counting(VectorTask):
        num_losses = 0

        def loss(self, model, batch):
            self.num_losses += 1
            return super().loss(model, batch)

    task = Counting(sizes=(1,) * total)
    mean_gradients(MLP(), task, ["out"], share=share)
    assert task.num_losses == wanted


def test_a_share_needs_the_number_of_batches():
    class Endless(VectorTask):
        def batches(self):
            yield from self.data

    with pytest.raises(ValueError, match=r"'vectors'.*share of 0.5.*list or a DataLoader"):
        mean_gradients(MLP(), Endless(), LAYERS, share=0.5)
    assert mean_gradients(MLP(), Endless(), ["fc2"])["fc2"].equal(mean_gradients(MLP(), VectorTask(), ["fc2"])["fc2"])


def test_a_task_without_batches_is_an_error():
    task = VectorTask("empty")
    task.data = []
    with pytest.raises(ValueError, match="'empty' gave no batch"):
        mean_gradients(MLP(), task, LAYERS)


# Fisher


def squared_gradients(model, task, layers):
    """Sum, in float64, `n * (gradient of the batch's mean loss) ** 2`, times `n / N`, over batches and entries."""
    fishers = {}
    total = sum(len(rows) for rows, _ in task.data)
    for name in layers:
        fishers[name] = torch.zeros(model.get_submodule(name).weight.shape, dtype=torch.float64)
        for batch in task.data:
            mean = gradients_one_by_one(model, task, [batch], [name])[name]
            for i, row in enumerate(mean):
                for j, entry in enumerate(row):
                    fishers[name][i, j] += len(batch[0]) ** 2 * float(entry) ** 2 / total
    return fishers


def test_fisher_is_the_mean_over_batches_of_n_times_the_squared_gradient():
    model, task = MLP(), VectorTask(sizes=(9, 4, 1, 6))
    fishers = fisher_diagonals(model, task, LAYERS)
    for name, wanted in squared_gradients(model, task, LAYERS).items():
        assert fishers[name].shape == model.get_submodule(name).weight.shape
        assert fishers[name].dtype == torch.float32
        close(fishers[name], wanted)


def test_fisher_of_single_examples_is_the_mean_of_their_squared_gradients():
    model, task = MLP(), VectorTask(sizes=(1,) * 12)
    fisher = fisher_diagonals(model, task, ["fc2"])["fc2"]
    close(fisher, sum(gradients_one_by_one(model, task, [batch], ["fc2"])["fc2"] ** 2 for batch in task.data) / 12)


class Signed(VectorTask):
    """Every example twice, once with the opposite loss: the mean gradient vanishes, those of examples do not."""

    def __init__(self, num_examples):
        super().__init__(sizes=(1,) * num_examples)
        self.data = [(*batch, sign * torch.ones(1)) for batch in self.data for sign in (-1.0, 1.0)]

    def loss(self, model, batch):
        rows, labels, signs = batch
        return (signs.to(rows.dtype) * torch.nn.functional.cross_entropy(model(rows), labels, reduction="none")).mean()


def test_fisher_of_batches_estimates_that_of_single_examples_where_the_mean_gradient_vanishes():
    model, task = MLP(), Signed(30)
    wanted = fisher_diagonals(model, task, ["fc2"])["fc2"].double()
    assert mean_gradients(model, task, ["fc2"])["fc2"].double().square().sum() < 1e-9 * wanted.sum()
    found = []
    for seed in range(40):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = Signed(30)
        shuffled.data = [
            tuple(torch.cat(parts) for parts in zip(*(task.data[i] for i in order[k : k + 4]), strict=True))
            for k in range(0, 60, 4)
        ]
        found.append(fisher_diagonals(model, shuffled, ["fc2"])["fc2"].double())
    # Drawn without replacement, so the expectation is smaller by the share (60 - 4) / (60 - 1).
    assert float((sum(found) / 40).sum() / wanted.sum()) == pytest.approx(56 / 59, rel=0.05)


def test_fisher_of_a_layer_that_no_gradient_reaches_is_zero():
    model = MLP()
    model.spare = torch.nn.Linear(3, 4)
    assert fisher_diagonals(model, VectorTask(), ["fc2", "spare"])["spare"].equal(torch.zeros(4, 3))


# Grams


def test_gram_is_the_sum_of_outer_products_of_the_inputs():
    model, task = MLP(), VectorTask(sizes=(9, 4, 1, 6))
    grams = input_grams(model, task, LAYERS)
    for name, inputs in mlp_inputs(model, torch.cat([rows for rows, _ in task.data])).items():
        close(grams[name], sum(torch.outer(row, row) for row in inputs))


def test_batch_mean_averages_by_place_and_skips_batches_of_another_size():
    model, task = MLP(), VectorTask(sizes=(8, 5, 8, 3))
    grams = input_grams(model, task, LAYERS, features="batch_mean")
    first, third = mlp_inputs(model, task.data[0][0]), mlp_inputs(model, task.data[2][0])
    for name in LAYERS:
        mean = (first[name] + third[name]) / 2
        close(grams[name], sum(torch.outer(row, row) for row in mean))


def test_batch_mean_lets_opposite_inputs_cancel_and_the_second_moment_does_not():
    task = VectorTask(sizes=(8, 8))
    task.data[1] = (-task.data[0][0], task.data[0][1])
    assert input_grams(MLP(), task, ["fc1"], features="batch_mean")["fc1"].abs().max() < 1e-6
    assert input_grams(MLP(), task, ["fc1"])["fc1"].abs().max() > 1


def test_results_do_not_depend_on_the_order_of_the_batches():
    model, task, turned = MLP(), VectorTask(sizes=(9, 4, 1, 6)), VectorTask(sizes=(9, 4, 1, 6))
    turned.data.reverse()
    for collect in (mean_gradients, input_grams, fisher_diagonals):
        ours, other = collect(model, task, LAYERS), collect(model, turned, LAYERS)
        for name in LAYERS:
            close(ours[name], other[name])


@pytest.mark.parametrize("build", [llama_model, clip_model, siglip_model])
def test_query_key_and_value_share_one_gram_and_the_output_does_not(build):
    model = build()
    if build is llama_model:
        task, block, output = TokenTask(), "model.layers.1.self_attn", "o_proj"
    else:
        task = classification_task(kind="clip" if build is clip_model else "siglip")
        block, output = "vision_model.encoder.layers.1.self_attn", "out_proj"
    q, k, v, o = (f"{block}.{name}" for name in ("q_proj", "k_proj", "v_proj", output))
    grams = input_grams(model, task, [q, k, v, o])
    assert grams[q] is grams[k]
    assert grams[q] is grams[v]
    assert grams[o] is not grams[q]
    assert not torch.allclose(grams[o], grams[q])
    alone = input_grams(model, task, [v])
    close(alone[v], grams[v])


def test_a_layer_that_shares_its_input_in_one_batch_only_is_an_error():
    class Routed(MLP):
        def forward(self, x):
            hidden = torch.tanh(self.fc1(x))
            branch = hidden if len(x) == 8 else hidden.clone()
            return self.out(torch.tanh(self.fc2(hidden) + self.spare(branch)))

    model = Routed()
    model.spare = torch.nn.Linear(17, 13)
    with pytest.raises(ValueError, match="'spare' shared its input with 'fc2'"):
        input_grams(model, VectorTask(sizes=(8, 5)), ["fc2", "spare"])


def test_what_was_made_of_an_input_in_place_is_another_input():
    class InPlace(MLP):
        def forward(self, x):
            hidden = self.fc1(x)
            first = self.fc2(hidden)
            hidden.relu_()
            return self.out(torch.tanh(first + self.spare(hidden)))

    model = InPlace()
    model.spare = torch.nn.Linear(17, 13)
    task = VectorTask()
    grams = input_grams(model, task, ["fc2", "spare"])
    with torch.no_grad():
        hidden = torch.cat([model.fc1(x) for x, _ in task.data])
    close(grams["fc2"], hidden.T @ hidden)
    close(grams["spare"], hidden.relu().T @ hidden.relu())


@pytest.mark.parametrize("collect", [mean_gradients, fisher_diagonals])
def test_a_loss_without_a_gradient_is_an_error(collect):
    class Quiet(VectorTask):
        def loss(self, model, batch):
            with torch.no_grad():
                return super().loss(model, batch)

    with pytest.raises(ValueError, match="'vectors': the loss depends on no target layer"):
        collect(MLP(), Quiet(), LAYERS)


@pytest.mark.parametrize("collect", [mean_gradients, input_grams])
def test_parts_without_examples_are_passed_over(collect):
    class Cut(VectorTask):
        def micro_batches(self, batch):
            x, y = batch
            return [(x[:0], y[:0]), (x, y), (x[:0], y[:0])]

    found = collect(MLP(), Cut(), LAYERS)
    for name, wanted in collect(MLP(), VectorTask(), LAYERS).items():
        close(found[name], wanted)


def more_padding(task, extra=5):
    longer = deepcopy(task)
    for batch in longer.data:
        for key in batch:
            batch[key] = torch.nn.functional.pad(batch[key], (0, extra))
    return longer


def test_padding_rows_are_left_out_of_the_gram():
    model, task = llama_model(), TokenTask()
    name = SELF_ATTENTION.format(0, "k")
    gram = input_grams(model, task, [name])[name]
    inputs = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    rows = []
    for batch in task.data:
        task.loss(model, batch)
        rows += [row[: int(mask.sum())] for row, mask in zip(inputs.pop(), batch["attention_mask"], strict=True)]
    hook.remove()
    wanted = sum(torch.outer(row, row) for row in torch.cat(rows).double())
    close(gram, wanted)


@pytest.mark.parametrize("features", ["second_moment", "batch_mean"])
def test_bases_do_not_change_with_more_padding(features):
    model, task = llama_model(), TokenTask()
    names = [SELF_ATTENTION.format(block, part) for block in (0, 1) for part in ("q", "k", "v", "o")]
    bases = principal_bases({name: model.get_submodule(name).weight for name in names}, dict.fromkeys(names, 0.5))
    grams = input_grams(model, task, names, features=features)
    padded = input_grams(model, more_padding(task), names, features=features)
    directions, other = new_directions(bases, grams, 0.7), new_directions(bases, padded, 0.7)
    for name in names:
        close(padded[name], grams[name])
        assert directions[name].shape[1] > 0
        assert other[name].shape == directions[name].shape
        torch.testing.assert_close(
            other[name] @ other[name].T, directions[name] @ directions[name].T, atol=1e-3, rtol=0
        )


def test_padding_would_change_the_gram_if_it_were_counted():
    class Unmasked(TokenTask):
        def padding_mask(self, layer, batch):
            return None

    model, name = llama_model(), SELF_ATTENTION.format(1, "q")
    with_padding, without = (input_grams(model, task, [name])[name] for task in (Unmasked(), TokenTask()))
    assert float((with_padding - without).norm() / without.norm()) > 0.1


def test_padding_of_class_prompts_does_not_change_the_text_towers_grams():
    model, task, longer = clip_model(), classification_task(), classification_task()
    longer.prompts = {key: torch.nn.functional.pad(value, (0, 2)) for key, value in longer.prompts.items()}
    assert (task.prompts["attention_mask"] == 0).any(), "prompts differ in length"
    name = "text_model.encoder.layers.1.self_attn.v_proj"
    close(input_grams(model, longer, [name])[name], input_grams(model, task, [name])[name])


def test_a_layer_that_never_ran_is_an_error():
    model = MLP()
    model.spare = torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match="'vectors' never ran layer 'spare'"):
        input_grams(model, VectorTask(), ["fc1", "spare"])


def test_real_rows_of_another_shape_are_an_error():
    class Wrong(TokenTask):
        def padding_mask(self, layer, batch):
            return batch["attention_mask"][:, 1:]

    name = SELF_ATTENTION.format(0, "q")
    with pytest.raises(ValueError, match=r"padding_mask\('model.layers.0.self_attn.q_proj'\) has shape \(4, 6\)"):
        input_grams(llama_model(), Wrong(), [name])


# Processes


def collect_in_one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, task = MLP(), VectorTask(sizes=(9, 4, 1, 6, 3))
    found = {
        "gradients": mean_gradients(model, task, LAYERS),
        "share": mean_gradients(model, task, LAYERS, share=0.41),
        "grams": input_grams(model, task, LAYERS),
        "fishers": fisher_diagonals(model, task, LAYERS),
    }
    with pytest.raises(ValueError, match="1 batches for 2 processes"):
        mean_gradients(model, VectorTask(sizes=(4,)), LAYERS)
    Path(folder, f"{rank}.safetensors").write_bytes(to_bytes(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    torch.multiprocessing.spawn(collect_in_one_of_two, (str(tmp_path),), nprocs=2)
    model, task = MLP(), VectorTask(sizes=(9, 4, 1, 6, 3))
    alone = {
        "gradients": mean_gradients(model, task, LAYERS),
        "share": mean_gradients(model, task, LAYERS, share=0.41),
        "grams": input_grams(model, task, LAYERS),
        "fishers": fisher_diagonals(model, task, LAYERS),
    }
    for rank in (0, 1):
        found = from_bytes((tmp_path / f"{rank}.safetensors").read_bytes())
        for kind, values in alone.items():
            for name in LAYERS:
                close(found[kind][name], values[name])


def test_gram_of_half_precision_inputs_is_summed_in_float32():
    model, task = MLP().to(torch.bfloat16), VectorTask()
    task.data = [(rows.to(torch.bfloat16), labels) for rows, labels in task.data]
    gram = input_grams(model, task, ["fc1"])["fc1"]
    assert gram.dtype == torch.float32
    close(gram, sum(torch.outer(row, row) for rows, _ in task.data for row in rows.double()))
    assert mean_gradients(model, task, ["fc1"])["fc1"].dtype == torch.float32
    assert linalg.orthonormality_error(new_directions({"fc1": torch.empty(11, 0)}, {"fc1": gram}, 0.9)["fc1"]) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_fishers_of_smaller_batches_are_those_of_a_task_in_smaller_batches(batch_size):
    model, whole = MLP(), VectorTask(sizes=(8, 8, 5))
    cut = VectorTask(sizes=(8, 8, 5))
    cut.data = [
        part
        for rows, labels in whole.data
        for part in zip(rows.split(batch_size), labels.split(batch_size), strict=True)
    ]
    ours = fisher_diagonals(model, whole, LAYERS, batch_size=batch_size)
    for name, wanted in fisher_diagonals(model, cut, LAYERS).items():
        torch.testing.assert_close(ours[name], wanted)


def test_the_fisher_of_single_examples_is_the_mean_of_their_squared_gradients():
    model, task = MLP(), VectorTask(sizes=(8, 5))
    ours = fisher_diagonals(model, task, LAYERS, batch_size=1)
    for name in LAYERS:
        total = torch.zeros_like(ours[name], dtype=torch.float64)
        for rows, labels in task.data:
            for row, label in zip(rows, labels, strict=True):
                one = [(row.unsqueeze(0), label.unsqueeze(0))]
                total += gradients_one_by_one(model, task, one, LAYERS)[name] ** 2
        torch.testing.assert_close(ours[name].double(), total / 13, atol=1e-7, rtol=1e-4)
