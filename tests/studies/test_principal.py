"""Weights rebuilt from their principal or their residual directions, and the command that scores them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from keeplora.cli import main as cli
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.weights import other_weights
from keeplora.runs.open import load_stream
from keeplora.studies import principal as analyze
from keeplora.studies.principal import PrincipalConfig, principal_curve, principal_spectrum
from keeplora.subspace import linear_algebra as linalg

LAYERS = ("fc1", "fc2", "q_proj", "v_proj")
"""Square and not: d_in < d_out, d_in > d_out, d_in == d_out."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    tiny.save_dual_encoder(folder / "model")
    tiny.write_benchmark(folder, tasks=2, per_class=4)
    return folder


@pytest.fixture
def stream(place):
    return load_stream(str(place / "model"), str(place / "colors.toml"))


def config_of(**values):
    return PrincipalConfig(**{"targets": LAYERS} | values)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def parts(weight, share):
    energies, directions = principal_spectrum(weight)
    basis = directions[:, : linalg.energy_rank(energies, share)]
    return linalg.project_onto(weight, basis), linalg.project_out(weight, basis)


def by_singular_values(weight, share):
    """Add up one rank-one term after another until the squared singular values reach the share."""
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    rebuilt, reached = np.zeros(weight.shape), 0.0
    for i in range(len(s)):
        if reached >= share * (s**2).sum():
            break
        rebuilt += s[i] * np.outer(u[:, i], vh[i])
        reached += s[i] ** 2
    return torch.from_numpy(rebuilt).float()


def spread(d_out, d_in):
    """A weight whose singular values fall off."""
    u, s, vh = torch.linalg.svd(torch.randn(d_out, d_in), full_matrices=False)
    return u * 0.7 ** torch.arange(len(s)) @ vh


SHAPES = pytest.mark.parametrize(("d_out", "d_in"), [(7, 11), (13, 6), (9, 9)])


@SHAPES
@pytest.mark.parametrize("share", [0.0, 0.3, 0.62, 0.85, 0.99])
def test_the_principal_part_is_that_of_a_truncated_svd(d_out, d_in, share):
    weight = spread(d_out, d_in)
    principal, residual = parts(weight, share)
    torch.testing.assert_close(principal, by_singular_values(weight, share), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(residual, weight - by_singular_values(weight, share), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(principal + residual, weight)


@SHAPES
def test_all_of_the_energy_is_all_of_the_weight_and_none_is_none(d_out, d_in):
    weight = spread(d_out, d_in)
    everything, nothing = parts(weight, 1.0)
    torch.testing.assert_close(everything, weight)
    torch.testing.assert_close(nothing, torch.zeros_like(weight), rtol=0, atol=1e-5)
    nothing, everything = parts(weight, 0.0)
    assert torch.equal(everything, weight)
    assert not nothing.any()


@SHAPES
def test_the_directions_are_those_that_keeplora_protects(d_out, d_in):
    weight = spread(d_out, d_in)
    energies, directions = principal_spectrum(weight)
    assert directions.shape == (d_in, min(d_out, d_in))
    for share in (0.2, 0.85):
        protected = linalg.top_directions(weight.T @ weight, share)
        assert torch.equal(directions[:, : linalg.energy_rank(energies, share)], protected)


def test_a_weight_of_zeros_has_no_principal_directions():
    energies, _ = principal_spectrum(torch.zeros(4, 3))
    assert linalg.energy_rank(energies, 0.9) == 0


def test_with_all_or_none_taken_away_the_scores_are_the_untouched_models(stream):
    model, tasks = stream
    curve = principal_curve(model, tasks, config_of(shares=(1.0, 0.0, 0.6)))
    none, _, everything = curve.points
    assert [point.share for point in curve.points] == [0.0, 0.6, 1.0]
    assert curve.untouched == evaluate(model, tasks) == none.residual == everything.principal
    assert none.width == 0.0


def test_the_scores_are_those_of_a_model_with_the_parts_copied_into_it(stream, place):
    model, tasks = stream
    (point,) = principal_curve(model, tasks, config_of(shares=(0.5,), towers=("vision",))).points
    for index, scores in enumerate((point.principal, point.residual)):
        other, _ = load_stream(str(place / "model"), str(place / "colors.toml"))
        ranks = []
        for name, module in other.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("vision_model") and name.split(".")[-1] in LAYERS:
                principal = by_singular_values(module.weight.detach(), 0.5)
                ranks.append(torch.linalg.matrix_rank(principal).item() / module.in_features)
                with torch.no_grad():
                    module.weight.copy_((principal, module.weight - principal)[index])
        assert len(ranks) == 2 * len(LAYERS)
        assert evaluate(other, tasks) == scores
        assert point.width == pytest.approx(np.mean(ranks))


def test_the_width_grows_with_the_share_up_to_the_rank(stream):
    model, tasks = stream
    curve = principal_curve(model, tasks, config_of(targets=("fc2",), towers=("text",), shares=(0.2, 0.7, 1.0)))
    widths = [point.width for point in curve.points]
    assert widths == sorted(set(widths))
    assert widths[-1] == 12 / 20  # fc2 is [12, 20]
    assert curve.layers == [f"text_model.encoder.layers.{i}.mlp.fc2" for i in range(2)]


def test_one_decomposition_a_layer_serves_all_shares(stream, monkeypatch):
    calls = []
    monkeypatch.setattr(analyze, "principal_spectrum", lambda w: calls.append(1) or principal_spectrum(w))
    model, tasks = stream
    curve = principal_curve(model, tasks, config_of(shares=(0.2, 0.5, 0.9)))
    assert len(calls) == len(curve.layers) == 4 * len(LAYERS)


def test_the_model_is_given_back_bit_by_bit(stream):
    model, tasks = stream
    before, addresses = weights_of(model), [parameter.data_ptr() for parameter in model.parameters()]
    principal_curve(model, tasks, config_of(shares=(0.4,)))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_the_model_is_given_back_when_an_evaluation_fails(stream, monkeypatch):
    model, tasks = stream
    before = weights_of(model)
    seen = []

    def failing(model, tasks, *, track):
        seen.append(weights_of(model))
        if len(seen) == 3:
            raise RuntimeError("out of memory")
        return [0.0] * len(tasks)

    monkeypatch.setattr(analyze, "evaluate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        principal_curve(model, tasks, config_of(shares=(0.4,)))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(seen[1][name] + seen[2][name], before[name])
    assert not torch.equal(seen[2][name], before[name])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_weight_that_two_layers_share_is_given_back():
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    with other_weights(model, {"a": torch.zeros(5, 3), "b": torch.ones(5, 3)}):
        assert not torch.equal(model["a"].weight, before)
    assert torch.equal(model["a"].weight, before)


def test_weights_of_half_precision_stay_so():
    model = nn.ModuleDict({"a": nn.Linear(3, 5).half()})
    with other_weights(model, {"a": torch.ones(5, 3)}):
        assert model["a"].weight.dtype == torch.float16


def test_chance_is_one_over_the_number_of_classes(stream):
    model, tasks = stream
    curve = principal_curve(model, tasks, config_of(shares=(0.5,)))
    assert curve.chance == [pytest.approx(100 / 3)] * 2


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_bad_share_is_an_error(share):
    with pytest.raises(
        ValueError, match=rf"shares = \(0.5, {share}\): Input should be (greater|less) than or equal to"
    ):
        PrincipalConfig(shares=(0.5, share))


@pytest.mark.parametrize("name", ["shares", "towers", "targets"])
def test_an_empty_option_is_an_error(name):
    with pytest.raises(ValueError, match=rf"{name} = \(\): Tuple should have at least 1 item"):
        PrincipalConfig(**{name: ()})


def test_a_tower_without_a_target_is_an_error_that_lists_the_towers(stream):
    with pytest.raises(ValueError, match=r"tower 'audio'; the targets are in text_model, vision_model: set towers"):
        principal_curve(*stream, config_of(towers=("vision", "audio")))


def test_a_weight_that_is_not_finite_is_named(stream):
    model, tasks = stream
    name = "text_model.encoder.layers.1.mlp.fc1"
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"the weight of layer '{name}' is not finite"):
        principal_curve(model, tasks, config_of())


def command(place, *arguments):
    flags = ["--model", place / "model", "--benchmark", place / "colors.toml", *arguments]
    cli.main(["analyze", "principal", *[str(flag) for flag in flags]])


@pytest.mark.slow
def test_the_command_writes_the_curve_and_prints_it(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command(place, "--output", tmp_path / "out", "--shares", "0.5", "1", "--towers", "text", "--targets", "q_proj")
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "principal.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["principal.json", "principal.png"]
    assert saved["layers"] == [f"text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert (saved["split"], saved["towers"], saved["targets"]) == ("test", ["text"], ["q_proj"])
    assert saved["tasks"] == ["task0", "task1"]
    assert [point["share"] for point in saved["points"]] == [0.5, 1.0]
    for scores in (
        saved["untouched"],
        saved["chance"],
        saved["points"][0]["principal"],
        saved["points"][0]["residual"],
    ):
        assert scores["mean"] == pytest.approx(sum(scores["tasks"]) / 2)
    row = next(line for line in shown.splitlines() if re.search(r"\b50 %", line))
    half = saved["points"][0]
    expected = [100 * half["width"], half["principal"]["mean"], half["residual"]["mean"]]
    assert re.findall(r"\d+\.\d", row) == [f"{value:.1f}" for value in expected]
    assert f"untouched {saved['untouched']['mean']:.1f}, chance 33.3; mean of 2 tasks" in shown
    with Image.open(tmp_path / "out" / "principal.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.slow
def test_two_analyses_give_the_same_bytes(place, tmp_path):
    for name in ("first", "second"):
        command(place, "--output", tmp_path / name, "--shares", "0.7")
    assert tiny.tree(tmp_path / "first") == tiny.tree(tmp_path / "second")


def test_the_validation_split_can_be_scored(place, tmp_path):
    command(place, "--output", tmp_path, "--shares", "0.7", "--split", "validation")
    assert json.loads((tmp_path / "principal.json").read_text())["split"] == "validation"


def test_names_that_matplotlib_or_rich_would_read_as_code_are_drawn(stream):
    model, tasks = stream
    config = config_of(model="[bold]$5_a$", benchmark="$\\frac$", shares=(0.5,))
    assert analyze.draw(principal_curve(model, tasks, config)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "principal"),
        (["princpal"], "principal"),
        (["principal", "--share", "0.5"], "--shares"),
        (["principal", "--shares", "1.5"], "shares = (1.5,): Input should be less than or equal to 1"),
        (["principal", "--shares", "most"], "most"),
        (["principal", "--towers", "audio", "--model", "MODEL", "--benchmark", "COLORS"], "error: no target layer"),
        (["principal", "--benchmark", "none"], "error: unknown benchmark 'none'"),
        (["principal", "--output", "/dev/null/out"], "error: Not a directory: /dev/null/out"),
    ],
)
def test_a_mistake_gives_one_message(place, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    known = {"MODEL": str(place / "model"), "COLORS": str(place / "colors.toml")}
    with pytest.raises(SystemExit) as caught:
        cli.main(["analyze", *[known.get(argument, argument) for argument in arguments]])
    assert caught.value.code not in (0, None)
    shown = capsys.readouterr()
    assert expected in shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["analyze"], "Example: keeplora analyze principal"), (["analyze", "principal"], "--towers")],
)
def test_help_teaches(capsys, arguments, expected):
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--help"])
    assert caught.value.code == 0
    assert expected in capsys.readouterr().out
