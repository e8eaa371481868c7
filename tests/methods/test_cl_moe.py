"""CL-MoE: the routers, what a layer computes, the momentum between tasks, and a run whose experts stay beside it."""

import json
import re
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F
from transformers import AutoModel

import tiny
from keeplora.cli import main as cli
from keeplora.layers import lora
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.base import TaskRecord
from keeplora.methods.cl_moe import CLMoE, CLMoEConfig, Router, kept_shares
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.training.trainer import TrainConfig
from tiny import MLP, VectorTask, classification_task, clip_model, llama_model, train

NAMES = ("fc1", "fc2", "out")
N, R, SCALING, BETA, GAMMA = 4, 3, 2.0, 0.3, 0.7


def cl_moe(**options):
    values = {"rank": R, "alpha": SCALING * R, "num_experts": N, "instance_share": BETA, "targets": NAMES}
    return CLMoE(CLMoEConfig(**values | options))


def task_of(seed):
    return VectorTask(f"task{seed}", seed)


def learn(method, model, seeds, **options):
    """Learn tasks one after another; return the model, and the record of each."""
    records = []
    for seed in seeds:
        adapted = method.before_task(model, task_of(seed))
        train(adapted, task_of(seed), **{"lr": 1.0} | options)
        model = method.after_task(adapted, task_of(seed))
        records.append(method.record)
    return model, records


def reread(record):
    """Return a record as it comes back from its files."""
    files = record.adapter.files()
    saved = SavedAdapter(SavedAdapter.config_from(files[lora.CONFIG_FILE]), load(files[lora.WEIGHTS_FILE]))
    return TaskRecord(adapter=saved, state=load(save(record.state)), merged=record.merged)


def outputs(model, rows):
    with torch.no_grad():
        return model(rows)


def rows_of(*seeds):
    return torch.cat([rows for seed in seeds for rows, _ in task_of(seed).data])


def in_eight_bytes(record, name):
    """Return a layer's factors, router and finished tasks `(router, key)`, in float64."""
    a, b = (factor.double() for factor in record.adapter.factors()[name])
    router, tasks = (record.state[f"{name}.{key}"].double() for key in ("router", "tasks"))
    return a, b, router, [(row[:N], row[N:]) for row in tasks]


# Routers


@pytest.mark.parametrize("shape", [(5, 11), (5, 7, 11), (5, 2, 3, 11)])
def test_the_weights_of_the_experts_sum_to_one_whatever_the_inputs_shape_and_the_tasks_known(shape):
    torch.manual_seed(0)
    tasks = torch.cat([torch.rand(3, N).softmax(1), torch.randn(3, 11)], dim=1)
    for known in (tasks[:0], tasks[:1], tasks):
        router = Router(torch.randn(N, 11), known, BETA)
        with torch.no_grad():
            before = router(torch.randn(shape))
        learning = router(torch.randn(shape))
        with torch.no_grad():
            after = router(torch.randn(shape))
        for weights in (before, learning, after):
            assert weights.shape == (*shape[:-1], N)
            torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))
            assert (weights >= 0).all()


def test_the_task_router_is_the_average_of_the_instance_router_over_what_was_seen():
    torch.manual_seed(0)
    router = Router(torch.randn(N, 11), torch.zeros(0, N + 11), BETA)
    batches = [torch.randn(4, 6, 11), torch.randn(2, 3, 11), torch.randn(5, 11)]
    for batch in batches:
        router(batch)
    routing, inputs = [], []
    for batch in batches:
        for instance in batch:
            positions = instance.reshape(-1, 11)
            routing.append((positions @ router.weight.detach().T).softmax(-1).mean(0))
            inputs.append(positions.mean(0))
    wanted = torch.cat([torch.stack(routing).mean(0), torch.stack(inputs).mean(0)])
    torch.testing.assert_close(router.known_tasks(), wanted.unsqueeze(0))


def test_a_frozen_router_learns_nothing_from_what_it_sees():
    router = Router(torch.randn(N, 11), torch.rand(2, N + 11), BETA).requires_grad_(False)
    before = deepcopy(router.state_dict())
    router(torch.randn(5, 7, 11))
    assert all(value.equal(before[name]) for name, value in router.state_dict().items())


def test_the_router_of_an_earlier_task_stays_as_it_was_while_a_later_one_is_trained():
    _, records = learn(cl_moe(), MLP(), (0, 1, 2))
    for name in NAMES:
        tasks = [record.state[f"{name}.tasks"] for record in records]
        assert [len(rows) for rows in tasks] == [1, 2, 3]
        assert tasks[2][:2].equal(tasks[1])
        assert tasks[1][:1].equal(tasks[0])
        assert not tasks[2][2].equal(tasks[2][1])
        assert not records[0].state[f"{name}.router"].equal(records[1].state[f"{name}.router"])


def test_factors_and_instance_routers_are_trained_and_the_frozen_routers_are_not():
    method = cl_moe()
    model, _ = learn(method, MLP(), (0,))
    adapted = method.before_task(model, task_of(1))
    start = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert len(trained) == 3 * len(NAMES)
    train(adapted, task_of(1), lr=1.0)
    changed = {name for name, value in adapted.named_parameters() if not value.equal(start[name])}
    assert changed == trained


# What a layer computes


def reference(record, name, row, *, key, task=None):
    """The paper's sum for one row of a layer, one expert after another; the nearest task's router if none is named."""
    a, b, router, tasks = in_eight_bytes(record, name)
    distances = [float((key - other).norm()) for _, other in tasks]
    of_task = tasks[distances.index(min(distances)) if task is None else task][0]
    of_instance = (router @ row).softmax(0)
    total = torch.zeros(len(b), dtype=torch.float64)
    for i in range(N):
        expert = b[:, i * R : (i + 1) * R] @ (a[i * R : (i + 1) * R] @ row)  # alpha / r is in b
        total += BETA * of_instance[i] * expert + (1 - BETA) * of_task[i] * expert
    return total


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_layers_output_is_the_papers_sum_with_the_nearest_tasks_router(seeds):
    model, records = learn(cl_moe(), MLP(), seeds)
    rows = rows_of(0, 1, 2)
    chosen = set()
    for name, width in (("fc1", 11), ("fc2", 17)):
        inputs = torch.randn(len(rows), 4, width, generator=torch.Generator().manual_seed(3))
        inputs = inputs + rows.unsqueeze(1) if width == 11 else inputs
        layer = model.get_submodule(name)
        got = outputs(layer, inputs)
        for instance, out in zip(inputs.double(), got.double(), strict=True):
            key = instance.mean(0)
            tasks = in_eight_bytes(records[-1], name)[3]
            chosen.add(min(range(len(tasks)), key=lambda i: float((key - tasks[i][1]).norm())))
            for row, one in zip(instance, out, strict=True):
                wanted = F.linear(row, layer.weight.double(), layer.bias.double())
                wanted = wanted + reference(records[-1], name, row, key=key)
                torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-4)
    assert chosen == set(range(len(seeds))), "every task is the nearest one for some instance"


def test_in_training_the_router_is_that_of_the_task_so_far():
    method = cl_moe()
    adapted = method.before_task(learn(method, MLP(), (0,))[0], task_of(1))
    layer = lora.lora_layers(adapted)["fc1"]
    rows = task_of(1).data[0][0]
    got = (layer(rows) - layer.get_base_layer()(rows)).detach().double()
    of_instance = (rows.double() @ method.record.state["fc1.router"].double().T).softmax(-1)
    record = deepcopy(method.record)
    record.state["fc1.tasks"] = torch.cat([of_instance.mean(0), torch.zeros(11)]).unsqueeze(0)
    for row, one in zip(rows.double(), got, strict=True):
        torch.testing.assert_close(one, reference(record, "fc1", row, key=row, task=0), atol=1e-5, rtol=1e-4)


# Momentum


def slow_kept(routers, top):
    """Lambda by the roles, one expert after another."""
    kept = []
    own = [set(sorted(range(N), key=lambda i: -float(row[i]))[:top]) for row in routers]
    for i in range(N):
        is_new, was_used = i in own[-1], any(i in experts for experts in own[-2:-1])
        kept.append(1 - GAMMA if is_new and not was_used else GAMMA)
    return kept


def test_an_expert_that_only_the_new_task_uses_takes_most_from_it_and_a_shared_one_keeps_most():
    routers = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2]])
    assert kept_shares(routers, 2, GAMMA).tolist() == pytest.approx([0.7, 0.7, 0.3, 0.7])
    assert kept_shares(routers[:1], 2, GAMMA).tolist() == pytest.approx([0.3, 0.3, 0.7, 0.7])
    generator = torch.Generator().manual_seed(0)
    for top in (1, 2, N):
        for _ in range(20):
            routers = torch.rand(3, N, generator=generator)
            assert kept_shares(routers, top, GAMMA).tolist() == pytest.approx(slow_kept(routers, top))


def test_after_a_task_each_expert_is_its_earlier_self_and_what_was_trained_in_the_shares_of_its_role():
    method = cl_moe(top_experts=1)
    model, seen = MLP(), set()
    for seed in range(4):
        old = method.record.adapter.factors() if seed else None
        adapted = method.before_task(model, task_of(seed))
        train(adapted, task_of(seed), lr=1.0)
        trained = {name: (a.clone(), b.clone()) for name, (a, b) in lora.factors_of(adapted).items()}
        model = method.after_task(adapted, task_of(seed))
        for name, factors in method.record.adapter.factors().items():
            kept = slow_kept(method.record.state[f"{name}.tasks"][:, :N], 1) if seed else [0.0] * N
            seen.update(kept)
            for side, got in enumerate(factors):
                for i, share in enumerate(kept):
                    block = (slice(i * R, (i + 1) * R), slice(None))[:: 1 if side == 0 else -1]
                    wanted = (1 - share) * trained[name][side][block]
                    wanted = wanted + share * old[name][side][block] if seed else wanted
                    torch.testing.assert_close(got[block], wanted)
    assert len(seen) == 3, "the first task, shared experts and specific ones all occurred"


# Between tasks


@pytest.mark.parametrize("build", [MLP, clip_model])
def test_beginning_a_later_task_does_not_change_the_function(build):
    make, options = (task_of, {}) if build is MLP else (lambda seed: classification_task("colors", seed), {})
    method = cl_moe(**options) if build is MLP else cl_moe(targets=CLMoEConfig().targets)
    model = build()
    for seed in (0, 1):
        adapted = method.before_task(model, make(seed))
        train(adapted, make(seed))
        model = method.after_task(adapted, make(seed))
    batch = next(iter(make(0).batches()))
    with torch.no_grad():
        wanted = make(0).outputs(model.eval(), batch)
        adapted = method.before_task(model, make(2))
        torch.testing.assert_close(make(0).outputs(adapted.eval(), batch), wanted, atol=1e-5, rtol=1e-5)
        back = method.after_task(adapted, make(2))
        torch.testing.assert_close(make(0).outputs(back, batch), wanted, atol=1e-5, rtol=1e-5)


def test_the_model_with_experts_beside_it_saves_and_copies_as_the_plain_base(tmp_path):
    options = {"targets": CLMoEConfig().targets}
    method, model = cl_moe(**options), llama_model()
    task = tiny.TokenTask()
    adapted = method.before_task(model, task)
    train(adapted, task, lr=1.0)
    model = method.after_task(adapted, task)
    base = llama_model()
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(value.equal(base.state_dict()[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        ids = task.data[0]["input_ids"]
        plain, routed = base(ids).logits, model(ids).logits
        assert type(model).from_pretrained(tmp_path)(ids).logits.equal(plain)
        assert deepcopy(model)(ids).logits.equal(routed)
        assert (routed - plain).abs().max() > 1e-3


def test_the_record_says_that_nothing_was_merged_and_counts_what_stays():
    _, records = learn(cl_moe(), MLP(), (0, 1))
    d_in, d_out = 11 + 17 + 13, 17 + 13 + 5
    experts, routers, tasks = N * R * (d_in + d_out), N * d_in, 2 * (3 * N + d_in)
    assert not records[-1].merged
    assert records[-1].added_parameters == experts + routers + tasks


def test_a_replayed_method_learns_the_next_task_bit_by_bit_as_one_that_went_on(tmp_path):
    torch.manual_seed(1)
    method = cl_moe()
    model, records = learn(method, MLP(), (0, 1))
    again, copy = cl_moe(), MLP()
    for record in records:
        copy = again.replay(copy, reread(record), tmp_path)
    assert sum(len(module._forward_hooks) for module in copy.modules()) == len(NAMES)
    rows = rows_of(0, 1, 2)
    assert outputs(copy, rows).equal(outputs(model, rows))
    (model, _), (copy, _) = learn(method, model, (2,)), learn(again, copy, (2,))
    assert method.record.adapter.files() == again.record.adapter.files()
    assert save(method.record.state) == save(again.record.state)
    assert outputs(copy, rows).equal(outputs(model, rows))


def test_training_a_base_weight_is_an_error():
    method = cl_moe()
    adapted = method.before_task(MLP(), task_of(0))
    with torch.no_grad():
        lora.lora_layers(adapted)["fc2"].get_base_layer().weight.add_(0.1)
    with pytest.raises(ValueError, match=r"'task0': the weight 'fc2.weight' of the base model was changed"):
        method.after_task(adapted, task_of(0))


def test_an_expert_that_is_not_finite_is_an_error_that_names_the_layer():
    method = cl_moe()
    adapted = method.before_task(MLP(), task_of(0))
    with torch.no_grad():
        lora.lora_layers(adapted)["fc2"].lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'task0': the trained experts of layer 'fc2' are not finite"):
        method.after_task(adapted, task_of(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, r"num_experts = 0: Input should be greater than 0"),
        ({"top_experts": 9}, r"top_experts = 9 must be from 1 to num_experts = 8"),
        ({"instance_share": 1.5}, r"instance_share = 1.5: Input should be less than or equal to 1"),
        ({"momentum": -0.1}, r"momentum = -0.1: Input should be greater than or equal to 0"),
        ({"rank": 0}, r"rank = 0"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        CLMoEConfig(**options)


# A run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a stream of two tasks, and a run."""
    folder = tmp_path_factory.mktemp("cl_moe")
    tiny.write_benchmark(folder, tasks=2, per_class=4)
    tiny.save_dual_encoder(folder / "model")
    run(config_of(folder, folder / "whole"))
    return folder


def config_of(folder, output):
    return RunConfig(
        benchmark=str(folder / "colors.toml"), model=str(folder / "model"), method="cl_moe", output=output,
        options=CLMoEConfig(rank=2, alpha=16.0, num_experts=3),
        train=TrainConfig(epochs=3, batch_size=5, learning_rate=0.2),
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_keeps_the_base_model_and_evaluate_gives_the_recorded_scores(place, capsys):
    metrics = json.loads((place / "whole/metrics.json").read_text())
    assert metrics["accuracy"][-1] != metrics["zero_shot"], "else equal scores would prove nothing"
    stored, given = (AutoModel.from_pretrained(path).state_dict() for path in (place / "whole/model", place / "model"))
    assert all(stored[name].equal(given[name]) for name in given)
    cli.main(["evaluate", str(place / "whole")])
    shown = capsys.readouterr().out
    for index, score in enumerate(metrics["accuracy"][-1]):
        row = next(line for line in shown.splitlines() if re.search(rf"\btask{index}\b.*\d", line))
        assert re.findall(r"\d+\.\d", row) == [f"{score:.1f}"] * 2


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(place, tmp_path):
    class CutOff(Exception):
        pass

    def cut(results):
        if len(results.accuracy) == 1:
            raise CutOff

    config = config_of(place, tmp_path / "cut")
    with pytest.raises(CutOff):
        run(config, watch=cut)
    run(config)
    ended, whole = (
        {name: content for name, content in tiny.tree(folder).items() if name.startswith("tasks/")
         and not name.endswith("task.json")} for folder in (tmp_path / "cut", place / "whole")
    )  # fmt: skip
    assert ended == whole
    accuracy = [
        json.loads((folder / "metrics.json").read_text())["accuracy"] for folder in (tmp_path / "cut", place / "whole")
    ]
    assert accuracy[0] == accuracy[1]
