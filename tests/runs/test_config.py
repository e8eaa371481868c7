"""Settings are resolved once: which goes before which, where each came from, and what contradicts another."""

import dataclasses
import json

import pytest

import tiny
from keeplora.methods.base import MethodConfig
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.methods.registry import known_methods, variants
from keeplora.runs.config import RunConfig, resolve
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.training.trainer import TrainConfig


@pytest.fixture
def benchmark(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[tasks]]\nname = "a"\npath = "a"\n'
        "[defaults.train]\nepochs = 3\nbatch_size = 7\n"
        "[defaults.keeplora]\nrank = 5\nfeature_energy = 0.9\ntrain = { learning_rate = 0.5 }\n"
        "[defaults.keeplora_plus]\nalpha = 9.0\n"
    )
    return str(path)


def test_a_setting_comes_from_the_first_place_that_has_it(benchmark):
    flags = ("--epochs", {"train": {"epochs": 1}})
    file = (
        "mine.toml",
        {"benchmark": benchmark, "method": "keeplora_plus", "seed": 4, "train": {"epochs": 2, "warmup": 0.5}},
    )
    config = resolve(flags, file)
    found = {name: config.settings[name] for name in config.settings if config.settings[name][1] != "default"}
    place = f"benchmark {benchmark!r}"
    assert found == {
        "benchmark": (benchmark, "mine.toml"),
        "method": ("keeplora_plus", "mine.toml"),
        "seed": (4, "mine.toml"),
        "train.epochs": (1, "--epochs"),
        "train.warmup": (0.5, "mine.toml"),
        "train.batch_size": (7, f"{place} [defaults.train]"),
        "train.learning_rate": (0.5, f"{place} [defaults.keeplora]"),
        "options.rank": (5, f"{place} [defaults.keeplora]"),
        "options.feature_energy": (0.9, f"{place} [defaults.keeplora]"),
        "options.alpha": (9.0, f"{place} [defaults.keeplora_plus]"),
        "options.classifier": ("cosine", "method keeplora_plus"),
    }
    assert config.settings["train.schedule"] == ("one_cycle", "default")
    assert set(config.settings) == {
        *(field.name for field in dataclasses.fields(RunConfig) if field.name not in ("train", "options", "sources")),
        *(f"train.{field.name}" for field in dataclasses.fields(TrainConfig)),
        *(f"options.{field.name}" for field in dataclasses.fields(KeepLoRAConfig)),
    }


def test_what_a_program_gives_is_told_from_a_default():
    config = RunConfig(seed=3, options=KeepLoRAConfig(rank=4))
    assert config.settings["seed"] == (3, "given")
    assert config.settings["options.rank"] == (4, "given")
    assert config.settings["options.alpha"] == (1.0, "default")


@pytest.mark.parametrize("name", known_methods())
def test_every_methods_own_defaults_are_defaults(name):
    assert {source for _, source in RunConfig(method=name).settings.values()} <= {"default", "given"}
    assert RunConfig(method=name).settings["method"][0] == name


# Contradictions


def test_options_of_another_kind_than_the_methods_are_refused():
    with pytest.raises(ValueError, match="options of method 'keeplora' must be KeepLoRAConfig, not MethodConfig"):
        RunConfig(method="keeplora", options=MethodConfig(rank=4))
    with pytest.raises(ValueError, match="options of method 'lora_ft' must be MethodConfig, not KeepLoRAConfig"):
        RunConfig(method="lora_ft", options=KeepLoRAConfig(rank=4))


@pytest.mark.parametrize("name", variants())
def test_options_that_are_not_the_variants_are_refused(name):
    """The name of a variant with the options of its method would be another experiment under this name."""
    (key, value), *_ = variants()[name]["options"].items()
    with pytest.raises(
        ValueError, match=rf"{key} = .* contradicts method '{name}', which is 'keeplora' with {key} = {value!r}"
    ):
        RunConfig(method=name, options=KeepLoRAConfig(rank=4))
    whole = KeepLoRAConfig(rank=4, **variants()[name]["options"])
    assert RunConfig(method=name, options=whole).options == whole


def test_another_method_does_not_keep_the_options_of_the_one_before():
    with pytest.raises(ValueError, match=r"options: feature_energy = 0.99 contradicts method 'keeplora_no_features'"):
        dataclasses.replace(RunConfig(), method="keeplora_no_features")
    with pytest.raises(ValueError, match="options of method 'ewc' must be EWCConfig"):
        dataclasses.replace(RunConfig(), method="ewc")


@pytest.mark.parametrize("source", ["--layer-scale", "mine.toml"])
def test_a_given_option_that_contradicts_the_variant_names_its_place(benchmark, source):
    with pytest.raises(ValueError, match=rf"^{source}: layer_scale = 0.4 contradicts method 'keeplora_pp'"):
        resolve((source, {"benchmark": benchmark, "method": "keeplora_pp", "options": {"layer_scale": 0.4}}))


def test_a_benchmark_that_contradicts_a_variant_is_refused_but_what_it_says_of_the_method_behind_is_left_out(tmp_path):
    path = tmp_path / "mine.toml"
    text = '[[tasks]]\nname = "a"\npath = "a"\n[defaults.keeplora]\nfeature_energy = 0.9\nrank = 3\n'
    path.write_text(text)
    options = resolve(("t", {"benchmark": str(path), "method": "keeplora_no_features"})).options
    assert (options.feature_energy, options.rank) == (0.0, 3)
    path.write_text(text + "[defaults.keeplora_no_features]\nfeature_energy = 0.5\n")
    with pytest.raises(ValueError, match=r"\[defaults.keeplora_no_features\]: feature_energy = 0.5 contradicts"):
        resolve(("t", {"benchmark": str(path), "method": "keeplora_no_features"}))


# Types


WRONG = [
    (TrainConfig, "epochs", "3"), (TrainConfig, "epochs", 3.0), (TrainConfig, "batch_size", True),
    (TrainConfig, "learning_rate", "1e-3"), (TrainConfig, "learning_rate", False), (TrainConfig, "schedule", 3),
    (MethodConfig, "rank", "16"), (MethodConfig, "rank", 16.5), (MethodConfig, "rank", None),
    (MethodConfig, "targets", "q_proj"), (MethodConfig, "targets", (1,)), (KeepLoRAConfig, "weight_energy", "0.5"),
    (KeepLoRAConfig, "weight_energy", {"vision": "much"}), (KeepLoRAConfig, "weight_energy", True),
    (RunConfig, "seed", "0"), (RunConfig, "save_model", 1), (RunConfig, "save_model", "no"),
    (RunConfig, "more", "birds.toml"), (RunConfig, "output", 3), (RunConfig, "benchmark", None),
    (RunConfig, "train", {"epochs": 3}), (RunConfig, "options", {"rank": 3}), (RunConfig, "first_tasks", "2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "value"), WRONG, ids=lambda one: getattr(one, "__name__", repr(one)))
def test_a_value_of_another_type_is_refused_by_name_in_a_program(kind, key, value):
    with pytest.raises(ValueError, match=rf"^{key} = "):
        kind(**{key: value})


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [case for case in WRONG if not isinstance(case[2], dict | tuple)],
    ids=lambda one: repr(one),
)
def test_a_value_of_another_type_is_refused_by_name_in_a_file(kind, key, value, benchmark):
    table = {TrainConfig: "train", RunConfig: ""}.get(kind, "options")
    values = {table: {key: value}} if table else {key: value}
    given = {"benchmark": benchmark, **values}
    with pytest.raises(ValueError, match=rf"here\.toml: (train\.)?{key} = "):
        resolve(("here.toml", given))


def test_lists_and_texts_of_a_file_are_what_a_program_would_give(benchmark, tmp_path):
    table = {"benchmark": benchmark, "output": "runs/x", "more": [benchmark], "options": {"targets": ["fc1"]}}
    config = resolve(("here.toml", table))
    assert (config.output.name, config.more, config.options.targets) == ("x", (benchmark,), ("fc1",))
    assert RunConfig(output="runs/x", more=[benchmark]) == RunConfig(output=config.output, more=(benchmark,))


# The run's own record


@pytest.mark.slow
def test_a_run_records_every_setting_and_its_source(tmp_path):
    model, stream = tiny.save_dual_encoder(tmp_path / "model"), tiny.write_benchmark(tmp_path, tasks=1, per_class=2)
    given = {"benchmark": str(stream), "model": str(model), "method": "lora_ft", "output": tmp_path / "run",
             "train": {"epochs": 1, "batch_size": 6}, "options": {"rank": 2}}  # fmt: skip
    config = resolve(("mine.toml", given))
    run(config)
    sources = read_manifest(tmp_path / "run")["sources"]
    assert sources == {name: source for name, (_, source) in config.settings.items()}
    assert (sources["train.epochs"], sources["options.rank"], sources["seed"]) == ("mine.toml", "mine.toml", "default")
    run(dataclasses.replace(config, sources={}))
    assert json.loads((tmp_path / "run/run.json").read_text())["sources"] == sources
