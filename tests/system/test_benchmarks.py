"""The benchmarks run, and what they compare is the same mathematics: the naive way finds what the library finds."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import compiled
import extrapolate
import matmul
import naive
import one_phase
import phases
import scale
import sketch
import whole_task
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers import lora
from keeplora.layers.gradients import mean_gradients
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.names import tower_share
from keeplora.methods.keeplora import KeepLoRA
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace import protected
from workloads import Workload, WorkloadConfig, load, prompts_of

BENCHMARKS = Path(phases.__file__).parent
SCRIPTS = ("workloads", "one_phase", "phases", "whole_task", "matmul", "scale", "compiled", "extrapolate", "sketch")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """The benchmarks time the CPU, and refuse to run where training would find a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_has_to_be_hidden(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES="):
        phases.main(phases.PhasesConfig(quick=True))


@pytest.fixture(scope="module", params=["mini", "llama_block"])
def workload(request) -> Workload:
    return load(
        WorkloadConfig(
            workload=request.param, images=24, test_images=16, batch_size=8, hidden=128, intermediate=192, length=12
        )
    )


@pytest.fixture
def bases(workload):
    return protected.principal_bases(weights_of(workload), shares_of(workload))


def weights_of(workload):
    return {name: workload.model.get_parameter(f"{name}.weight").detach() for name in workload.targets}


def shares_of(workload):
    return {name: tower_share(name, workload.options.weight_energy) for name in workload.targets}


def angle(basis: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest principal angle between two spans of equal dimension, by its sine: exact for small ones."""
    assert basis.shape == other.shape
    return float(torch.linalg.matrix_norm(linalg.project_out(basis.T.double(), other.double()), ord=2).clamp(max=1))


def test_naive_finds_the_principal_subspaces_of_the_library(workload, bases):
    found = naive.principal_bases(weights_of(workload), shares_of(workload))
    assert max(angle(bases[name], found[name]) for name in bases) < 1e-3


def test_naive_finds_the_gradients_of_the_library(workload):
    exact = mean_gradients(workload.model, workload.task, workload.targets)
    found = naive.mean_gradients(workload.model, workload.padded, workload.targets)
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm()


def test_naive_starts_in_the_span_of_the_librarys_start(workload, bases):
    gradients = mean_gradients(workload.model, workload.task, workload.targets)
    found = naive.start(gradients, bases, 4)
    for name, gradient in gradients.items():
        _, s, vh = linalg.low_rank(linalg.project_out(gradient, bases[name]), 5)
        if s[4] < 0.99 * s[3] and s[3] > 1e-3 * gradient.norm():  # otherwise the span is not determined
            assert angle(vh[:4].T, found[name][0].T) < 1e-3


def test_naive_protects_the_subspaces_of_the_library_where_both_read_the_same_rows(workload, bases):
    grams = input_grams(workload.model, workload.task, workload.targets)
    exact = protected.new_directions(bases, grams, 0.9)
    matrices = naive.token_matrices(workload.model, workload.task, workload.targets, features="all")
    found = naive.new_directions(bases, matrices, 0.9)
    assert sum(directions.shape[1] for directions in exact.values()) > 0
    assert max(angle(exact[name], found[name]) for name in bases if exact[name].shape[1]) < 1e-3


def test_cut_and_padded_tasks_have_the_same_logits_and_scores(workload):
    batch = next(iter(workload.task.batches()))
    with torch.no_grad():
        outputs = [task.outputs(workload.model, batch) for task in (workload.task, workload.padded)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert evaluate(workload.model, [workload.task]) == [pytest.approx(naive.evaluate(workload.model, workload.padded))]


def test_naive_starts_and_merges_without_changing_what_it_should_not(workload, bases):
    model = load(workload.config).model
    batch = next(iter(workload.task.batches()))
    with torch.no_grad():
        before = workload.task.outputs(model, batch)
    factors = naive.start(mean_gradients(model, workload.task, workload.targets), bases, 4)
    adapted = naive.attach(model, factors, 0.25)
    with torch.no_grad():
        torch.testing.assert_close(workload.task.outputs(adapted, batch), before, rtol=1e-3, atol=1e-3)
    losses = naive.fit(adapted, workload.padded, epochs=2)
    adapted.eval()
    with torch.no_grad():
        trained = workload.task.outputs(adapted, batch)
        merged = naive.merge(adapted)
        torch.testing.assert_close(workload.task.outputs(merged, batch), trained, rtol=1e-3, atol=1e-3)
    assert len(losses) == 2
    assert not torch.allclose(trained, before)
    assert lora.linear_targets(merged, workload.options.targets) == workload.targets


def test_the_library_runs_on_every_workload(workload):
    model = load(workload.config).model
    method = KeepLoRA(workload.options)
    adapted = method.before_task(model, workload.task)
    method.after_task(adapted, workload.task)
    assert method.record.directions


def test_the_prompts_differ_and_have_equal_ends():
    prompts = prompts_of(1000)
    ids = prompts["input_ids"]
    assert len(ids.unique(dim=0)) == 1000
    assert (ids.gather(1, prompts["attention_mask"].sum(1, keepdim=True) - 1) == ids.max()).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script, monkeypatch, capsys):
    path = BENCHMARKS / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code in (0, None)
    assert "usage" in capsys.readouterr().out


def test_the_phases_are_measured_and_composed(tmp_path):
    phases.main(phases.PhasesConfig(quick=True, output=tmp_path))
    records = json.loads((tmp_path / "mini-quick.json").read_text())["records"]
    measured = {(record["system"], record["phase"]) for record in records}
    assert {("keeplora", "gradient"), ("lora_ft", "step"), ("naive", "update")} <= measured
    assert "| gradient (per example) |" in (tmp_path / "mini-quick.md").read_text()
    result = json.loads((tmp_path / "mini-quick.json").read_text())
    text = whole_task.report(result, whole_task.TaskConfig(results=tmp_path / "mini-quick.json"))
    assert "keeplora / lora_ft" in text
    assert "Composed, not run: 128 images, 10 epochs" in text


SECONDS = {"gradient": 0.5, "initialise": 3.0, "step": 2.0, "watched_step": 2.5, "features": 0.25, "evaluate": 0.125}


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 100 * 0.5 + 3 + 12 * 2 + 100 * 0.25 + 8 * 0.125),
        ({"gradient_share": 0.4, "features": "last_epoch"}, 64 * 0.5 + 3 + 8 * 2 + 4 * 2.5 + 8 * 0.125),
    ],
)
def test_a_tasks_cost_is_the_sum_of_its_phases(options, seconds, tmp_path):
    config = whole_task.TaskConfig(results=tmp_path, images=100, test_images=8, epochs=3, **options)
    records = [{"system": "keeplora", "phase": phase, "repeat": 0, "units": 2, "seconds": 2 * value}
               for phase, value in SECONDS.items()]  # fmt: skip
    counts = {phase: n for phase, n in whole_task.counts_of(config, 32, "keeplora").items() if phase in SECONDS}
    assert whole_task.totals_of(records, "keeplora", counts, "seconds") == [pytest.approx(seconds)]


def test_the_options_of_keeplora_change_no_other_systems_cost(tmp_path):
    plain, chosen = (whole_task.TaskConfig(results=tmp_path, **options)
                     for options in ({}, {"gradient_share": 0.1, "features": "last_epoch"}))  # fmt: skip
    for system in ("lora_ft", "naive"):
        assert whole_task.counts_of(plain, 32, system) == whole_task.counts_of(chosen, 32, system)


def test_a_phase_is_measured_in_a_process_of_its_own():
    config = phases.PhasesConfig(images=8, batch_size=8)
    measured = phases.in_a_process(phases.phase_config(config, "lora_ft", "merge", None))
    assert measured["seconds"] > 0
    assert measured["peak_memory_mb"] > 0


@pytest.mark.parametrize("system", ["keeplora", "lora_ft", "naive"])
def test_a_whole_task_is_measured(system):
    config = one_phase.PhaseConfig(phase="task", system=system, images=16, test_images=8, batch_size=8, epochs=2)
    assert one_phase.measure(config)["seconds"] > 0


def test_eigenproblems_and_grams_are_measured(tmp_path):
    config = matmul.MatmulConfig(
        parts=("rate", "grams", "eigh", "residual", "svd"),
        sides=(64,),
        widths=(32, 768),
        rows=50,
        repeats=1,
        output=tmp_path / "a",
    )
    matmul.main(config)
    results = json.loads((tmp_path / "a").read_text())["results"]
    assert {row["d_in"] for row in results["grams"]} == {768}
    assert {row["way"] for row in results["residual"]} > {matmul.RESIDUAL}
    assert {row["solver"] for row in results["eigh"]} >= {matmul.LIBRARY, "torch.linalg.eigh", "numpy.linalg.eigh"}


def test_the_angle_of_a_sketch_is_told_of_all_directions_asked_for():
    exact = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1e-6, 0.0]))[:, :4]
    assert sketch.quality(exact, torch.eye(4)[:3], 4).angle == pytest.approx(0, abs=1e-4)
    assert sketch.quality(exact, torch.eye(4)[:2], 3).angle == pytest.approx(90)
    tilted = torch.eye(4)[:3].clone()
    tilted[2] = torch.tensor([0.0, 0.0, 1.0, 0.1])
    assert sketch.quality(exact.T, tilted @ torch.eye(4, 5), 3).angle == pytest.approx(5.7, abs=0.1)


def test_the_scale_is_measured_tabulated_and_drawn(tmp_path):
    scale.main(scale.ScaleConfig(quick=True, axes=("tasks", "depth"), output=tmp_path))
    records = json.loads((tmp_path / "scale-quick.json").read_text())["records"]
    assert {(record["axis"], record["value"]) for record in records} == {("tasks", 1), ("tasks", 3), ("depth", 2),
                                                                         ("depth", 4)}  # fmt: skip
    assert "| step of lora_ft, per step |" in (tmp_path / "scale-quick.md").read_text()
    assert (tmp_path / "scale-quick.png").stat().st_size > 0


def test_work_goes_to_a_process_of_its_own():
    assert scale.in_a_process(len, []) == 0


def test_cost_in_proportion_has_exponent_one():
    assert scale.exponent({10: 2.0, 30: 4.5, 100: 20.0}) == pytest.approx(1)


def test_every_task_learned_before_fills_a_sixteenth_of_what_is_free():
    config = one_phase.PhaseConfig(images=8, batch_size=8)
    workload = load(config)
    principal = one_phase.Given(config, workload).bases
    filled = one_phase.Given(dataclasses.replace(config, learned_tasks=8), workload).bases
    for name, basis in principal.items():
        d_in, k = basis.shape
        assert filled[name].shape[1] == k + (d_in - k) // 2
        assert linalg.orthonormality_error(filled[name]) < 1e-4


def test_every_way_to_take_a_step_is_timed(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What the compiler's tracing warns of is its own.
        compiled.main(compiled.CompiledConfig(quick=True))
    printed = capsys.readouterr().out
    assert all(f"| {way} |" in printed for way in compiled.WAYS)


def test_the_page_on_cost_holds_what_the_extrapolation_prints():
    page = (BENCHMARKS.parent / "docs" / "cost.md").read_text()
    assert extrapolate.report(extrapolate.ExtrapolateConfig()) in page


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
