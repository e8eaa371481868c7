"""Updates that stay beside the weights: nothing of them is lost, and they are where the merged ones would be."""

import pytest
import torch

import chatty
from keeplora.cli import main as cli
from keeplora.data.benchmark import read_benchmark
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.beside import beside
from keeplora.layers.lora import lora_layers
from keeplora.methods.registry import METHODS
from keeplora.models import pretrained
from keeplora.models.pretrained import Precision
from keeplora.models.registry import family_of
from keeplora.progress import silent
from keeplora.runs.branch import undo
from keeplora.runs.config import resolve
from keeplora.runs.export import ExportConfig, export_run
from keeplora.runs.exported import reopen_export
from keeplora.runs.loop import run
from keeplora.runs.open import read_run, reopen
from keeplora.runs.verify import certify
from keeplora.training.trainer import TrainConfig, fit, seed_everything

COARSE = {"bf16": Precision("bfloat16"), "fp16": Precision("float16"), "nf4": Precision("float32", "nf4"),
          "nf4 in bf16": Precision("bfloat16", "nf4")}  # fmt: skip
TRAIN = TrainConfig(epochs=2, batch_size=4, learning_rate=5e-3)
MERGING = [name for name in METHODS if name not in ("zero_shot", "cl_moe")]  # These change no weight.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    chatty.write_stream(folder, tasks=3, with_images=False)
    chatty.save_text_model(folder / "model")
    return folder


def learned(place, name, precision=Precision(), **options):  # noqa: B008
    """Learn three tasks; return the model, its tasks, the method's records, and the updates as they were trained."""
    family, source = family_of(str(place / "model")), str(place / "model")
    specs = read_benchmark(str(place / "chat.toml")).tasks
    tasks = family.tasks(source, specs, batch_size=4, evaluation="test", seed=0, track=silent)
    model = family.load(source, precision)
    kind = METHODS[name]
    method = kind(kind.Config(rank=2, **options), seed=0)
    records, trained = [], []
    for index, training_task in enumerate(method.schedule(tasks)):
        seed_everything(index)
        adapted = method.before_task(model, training_task)
        fit(adapted, method.training_task(adapted, training_task, 2), TRAIN, penalty=method.penalty)
        trained.append({name: one.get_delta_weight("default").detach() for name, one in lora_layers(adapted).items()})
        model = method.after_task(adapted, training_task)
        records.append(method.record)
    return model, tasks, method, records, trained


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGING)
def test_beside_float32_weights_methods_learn_what_they_learn_inside_them(place, name):
    merged, tasks, *_ = learned(place, name, updates="merged")
    aside, others, *_ = learned(place, name, updates="beside")
    family = family_of(str(place / "model"))
    untouched = dict(family.load(str(place / "model")).named_parameters())
    for key, weight in aside.named_parameters():
        assert torch.equal(weight, untouched[key])
    for key, updates in beside(aside).items():
        weight = merged.get_submodule(key).weight.detach()
        change = weight - untouched[f"{key}.weight"].detach()
        assert (sum(b @ a for a, b in updates) - change).norm() <= 1e-5 * weight.norm()
    assert evaluate(merged, tasks) == pytest.approx(evaluate(aside, others), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", COARSE)
def test_beside_coarse_weights_the_model_computes_with_what_was_trained(place, precision):
    model, _, method, records, trained = learned(
        place, "keeplora", COARSE[precision], weight_energy=0.3, feature_energy=0.8
    )
    plain = family_of(str(place / "model")).load(str(place / "model"), COARSE[precision])
    generator = torch.Generator().manual_seed(0)
    for key in beside(model):
        own, base = model.get_submodule(key), plain.get_submodule(key)
        x = torch.randn(40, own.in_features, generator=generator)
        with torch.no_grad():
            hook = next(iter(own._forward_hooks.values()))
            computed = hook(own, (x,), torch.zeros(40, own.out_features))
            assert torch.equal(own.weight, base.weight)
        expected = sum(x @ update[key].T for update in trained if key in update)
        assert (computed - expected).norm() <= 0.01 * expected.norm()
    for record in records:
        assert record.merge_loss == 0
        assert max(one.leak for one in record.certificate.values()) < 1e-3
    assert all(basis.dtype == torch.float32 for basis in method.protected().values())


def test_merging_into_half_precision_would_have_lost_the_update(place):
    small = {"updates": "merged", "allow_merge_loss": True}
    *_, records, _ = learned(place, "lora_ft", COARSE["bf16"], **small)
    assert min(record.merge_loss for record in records) > 0.05  # Otherwise the tests above show nothing.


def test_weights_of_four_bits_take_no_update(place):
    with pytest.raises(ValueError, match=r"'merged': layer '.*' has a weight of 4 bits, which takes none"):
        learned(place, "lora_ft", COARSE["nf4"], updates="merged")


def test_a_run_of_four_bits_that_is_to_merge_is_refused_before_it_starts(tmp_path):
    values = {"quantize": "nf4", "options": {"updates": "merged"}, "output": tmp_path / "run"}
    with pytest.raises(ValueError, match="weights of 4 bits take no update; leave out updates = 'merged'"):
        resolve(("test", values))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero_shot", "sd_lora", "cl_moe", "sefe", "ewc"])
def test_a_run_of_any_method_is_opened_again_beside_its_weights(place, tmp_path, method):
    values = {
        "benchmark": str(place / "chat.toml"),
        "model": str(place / "model"),
        "method": method,
        "train": vars(TRAIN),
    }
    options = {} if method == "zero_shot" else {"rank": 2}
    results = run(resolve(("test", {**values, "dtype": "bfloat16", "options": options, "output": tmp_path / "run"})))
    _, model, tasks = reopen(tmp_path / "run")
    assert evaluate(model, tasks) == pytest.approx(results.accuracy[-1])
    assert certify(tmp_path / "run").breaches == []


def test_without_bitsandbytes_the_error_names_the_package(place, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes: pip install 'keeplora\[quantize\]'"):
        family_of(str(place / "model")).load(str(place / "model"), COARSE["nf4"])


class CutOff(Exception):
    """Ends a run on purpose."""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantize": "nf4"}])
def test_a_run_beside_its_weights_that_was_cut_off_ends_with_the_same_bytes(place, tmp_path, settings):
    options = {"rank": 2, "weight_energy": 0.3, "feature_energy": 0.8}
    values = {"benchmark": str(place / "chat.toml"), "model": str(place / "model"), "train": vars(TRAIN), **settings}

    def configured(name):
        return resolve(("test", {**values, "options": options, "output": tmp_path / name}))

    def cut(results):
        if len(results.accuracy) == 2:
            raise CutOff

    whole = run(configured("whole"))
    with pytest.raises(CutOff):
        run(configured("cut"), watch=cut)
    resumed = run(configured("cut"))
    assert (resumed.accuracy, resumed.zero_shot) == (whole.accuracy, whole.zero_shot)
    for path in sorted((tmp_path / "whole" / "tasks").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantize": "nf4"}, {"options": {"updates": "beside"}}])
def test_a_run_beside_its_weights_is_evaluated_certified_undone_and_exported(place, tmp_path, settings, capsys):
    options = {"rank": 2, "weight_energy": 0.3, "feature_energy": 0.8, **settings.get("options", {})}
    values = {"benchmark": str(place / "chat.toml"), "model": str(place / "model"), "train": vars(TRAIN), **settings}
    config = resolve(("test", {**values, "options": options, "output": tmp_path / "run"}))
    results = run(config)
    assert not (tmp_path / "run" / "model").exists()
    _, model, tasks = reopen(tmp_path / "run")
    assert evaluate(model, tasks) == pytest.approx(results.accuracy[-1])
    proof = certify(tmp_path / "run")
    assert proof.breaches == []
    assert all(one.is_checked for one in proof.tasks)
    cli.main(["evaluate", str(tmp_path / "run")])
    undone = undo(tmp_path / "run", "task1", tmp_path / "undone")
    assert undone.accuracy[0] == pytest.approx(results.accuracy[0][:1] + results.accuracy[0][2:])
    assert certify(tmp_path / "undone").breaches == []
    assert read_run(tmp_path / "undone").num_finished == 2

    export_run(tmp_path / "run", ExportConfig(format="merged", output=tmp_path / "merged"))
    _, _, merged, _ = reopen_export(tmp_path / "merged")
    untouched = family_of(config.model).load(config.model)
    for key, updates in beside(model).items():
        change = merged.get_submodule(key).weight - untouched.get_submodule(key).weight
        wanted = sum(b @ a for a, b in updates)
        assert (change - wanted).norm() <= 1e-5 * untouched.get_submodule(key).weight.norm()
