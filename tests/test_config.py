"""Configurations: what a wrong file or key is told."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from keeplora.config import Config, parse, read_toml
from keeplora.data.benchmark import Benchmark, TaskSpec
from keeplora.methods.base import MethodConfig
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.runs.config import RunConfig
from keeplora.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    width: int = 3
    kind: Literal["round", "square"] = "round"


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    name: str
    inner: Inner = field(default_factory=Inner)


def message(kind, values):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every caller checks the words
        parse(kind, values, source="here.toml")
    return str(caught.value)


def test_values_of_a_table_become_the_dataclass():
    assert parse(Outer, {"name": "x", "inner": {"width": 4}}, source="f") == Outer(name="x", inner=Inner(width=4))


def test_an_unknown_key_at_the_top_is_named_with_the_known_ones():
    text = message(Outer, {"name": "x", "witdh": 3})
    assert "here.toml" in text
    assert "unknown key 'witdh'" in text
    assert "known keys: name, inner" in text


def test_an_unknown_key_in_a_table_is_named_with_the_keys_of_that_table():
    text = message(Outer, {"name": "x", "inner": {"witdh": 3}})
    assert "here.toml" in text
    assert "'inner.witdh'" in text
    assert "known keys: width, kind" in text


def test_an_unknown_key_of_the_second_task_of_a_benchmark_is_named():
    tasks = [{"name": "a", "path": "a"}, {"name": "b", "path": "b", "temlate": "x {}"}]
    text = message(Benchmark, {"name": "x", "tasks": tasks})
    assert "'tasks.1.temlate'" in text
    assert "template" in text.split("known keys")[1]


def test_unknown_keys_of_a_run_and_of_its_train_table_list_what_there_is():
    assert "benchmark, model, method" in message(RunConfig, {"modell": "x"})
    text = message(RunConfig, {"train": {"lr": 1}})
    assert "'train.lr'" in text
    assert "learning_rate" in text.split("known keys")[1]


def test_a_value_of_a_wrong_type_is_named_with_its_key():
    text = message(Outer, {"name": "x", "inner": {"width": "wide"}})
    assert "here.toml" in text
    assert "inner.width = 'wide'" in text
    assert "integer" in text


def test_a_value_outside_the_choices_lists_them():
    text = message(Outer, {"name": "x", "inner": {"kind": "oval"}})
    assert "inner.kind = 'oval'" in text
    assert "round" in text
    assert "square" in text


def test_a_missing_key_is_named():
    text = message(Outer, {"inner": {}})
    assert "here.toml" in text
    assert "'name' is missing" in text


def test_every_mistake_of_a_file_is_named_at_once():
    text = message(Outer, {"nam": "x", "inner": {"width": "wide"}})
    assert "'nam'" in text
    assert "'name' is missing" in text
    assert "inner.width" in text


def test_a_mapping_value_out_of_range_is_told_without_the_parsers_own_words():
    text = message(KeepLoRAConfig, {"weight_energy": {"vision": 1.5}})
    assert "weight_energy for 'vision' = 1.5" in text
    assert "Value error" not in text


def test_a_text_for_weight_energy_names_the_key():
    text = message(KeepLoRAConfig, {"weight_energy": "much"})
    assert "weight_energy = 'much'" in text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*absent\.toml"):
        read_toml(tmp_path / "absent.toml")


def test_a_folder_instead_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give a TOML file"):
        read_toml(tmp_path)


@pytest.mark.parametrize("content", [b"rank == 3", b"\xff\xfe\x00", b"[train\nepochs = 1"])
def test_what_is_not_toml_is_named_with_the_file(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.toml is not a TOML file"):
        read_toml(path)


def test_a_toml_file_is_read(tmp_path):
    path = tmp_path / "good.toml"
    path.write_text("seed = 3\n[train]\nepochs = 2\n")
    assert read_toml(path) == {"seed": 3, "train": {"epochs": 2}}


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (TrainConfig, "epochs", 0),
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "accumulation", -1),
        (TrainConfig, "learning_rate", 0.0),
        (TrainConfig, "learning_rate", float("nan")),
        (TrainConfig, "learning_rate", float("inf")),
        (TrainConfig, "weight_decay", -0.1),
        (TrainConfig, "warmup", 1.0),
        (TrainConfig, "schedule", "linear"),
        (TrainConfig, "mixed_precision", "int4"),
        (MethodConfig, "rank", 0),
        (MethodConfig, "alpha", 0.0),
        (MethodConfig, "alpha", float("inf")),
        (MethodConfig, "targets", ()),
        (KeepLoRAConfig, "weight_energy", 1.5),
        (KeepLoRAConfig, "feature_energy", -0.1),
        (KeepLoRAConfig, "feature_energy", float("nan")),
        (KeepLoRAConfig, "layer_scale", 2.0),
        (KeepLoRAConfig, "gradient_share", 0.0),
        (KeepLoRAConfig, "b_start", "ones"),
        (KeepLoRAConfig, "features", "median"),
        (KeepLoRAConfig, "classifier", "linear"),
        (RunConfig, "method", "keeplore"),
        (RunConfig, "seed", -1),
        (RunConfig, "seed", 2**31),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(kind, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        kind(**{key: value})
    if value != ():
        assert str(value) in str(caught.value)


def test_the_defaults_are_the_papers_for_mtil():
    config = KeepLoRAConfig()
    assert (config.rank, config.alpha, config.feature_energy) == (16, 1.0, 0.99)
    assert config.weight_energy == {"vision": 0.85, "text": 0.2, "other": 0.6}
    assert (config.b_start, config.features, config.layer_scale, config.classifier) == (
        "zero", "second_moment", 1.0, "none",
    )  # fmt: skip


@pytest.mark.parametrize(("key", "table"), [("epochs", "train"), ("learning_rate", "train"), ("rank", "options")])
def test_a_key_in_the_wrong_table_is_told_the_right_one(key, table):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; it belongs into the table \[{table}\]"):
        parse(RunConfig, {key: 1}, source="settings.toml")


@pytest.mark.parametrize("kind", [TaskSpec, RunConfig])
def test_keys_that_are_filled_in_are_not_offered(kind):
    with pytest.raises(ValueError, match="known keys") as caught:
        parse(kind, {"nothing": 1}, source="x.toml")
    assert not {"hub", "sources"} & set(re.findall(r"[a-z_]+", str(caught.value).split("known keys")[1]))
