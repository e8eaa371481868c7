"""Another package adds a method, a model family, a reader and a metric: a class or function and a registration each."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

import tiny
from keeplora.registry import Registry

EXTENSION = '''
    """What another package would bring."""

    from PIL import Image
    from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel

    from keeplora.data.images import Examples
    from keeplora.data.readers import READERS
    from keeplora.evaluation.metrics import METRICS
    from keeplora.methods.base import Method
    from keeplora.methods.registry import METHODS
    from keeplora.models.dual_encoder import DualEncoder
    from keeplora.models.registry import FAMILIES


    class TwoTowerConfig(CLIPConfig):
        model_type = "two_tower"


    class TwoTower(CLIPModel):
        config_class = TwoTowerConfig


    AutoConfig.register("two_tower", TwoTowerConfig)
    AutoModel.register(TwoTowerConfig, TwoTower)


    @FAMILIES.register("two_tower")
    class TwoTowerFamily(DualEncoder):
        """Loads a model of a type that keeplora does not know."""


    @METHODS.register("forgetful")
    class Forgetful(Method):
        """Train a LoRA and throw it away."""

        def after_task(self, model, task):
            return self.abandon(model)


    @METRICS.register("error_rate")
    def error_rate(predictions, references):
        return 100.0 * sum(p != r for p, r in zip(predictions, references)) / len(predictions)


    @READERS.register("two_colors")
    def two_colors(spec):
        names = ("blue", "red")
        labels = (0, 1) * 4
        examples = Examples(
            names, labels, lambda i: Image.new("RGB", (20, 20), names[labels[i]]), lambda i: f"two_colors, image {i}"
        )
        return {"train": examples, "test": examples}
'''

BENCHMARK = """
[[tasks]]
name = "colors"
path = "nowhere"
reader = "two_colors"
metric = "METRIC"
"""


@pytest.fixture
def installed(tmp_path):
    """Install another package beside ours: its module, and what says that it has an entry point."""
    (tmp_path / "my_extension.py").write_text(textwrap.dedent(EXTENSION))
    info = tmp_path / "my_extension-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-extension\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[keeplora]\nmine = my_extension\n")
    tiny.save_dual_encoder(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"model_type": "two_tower"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    for metric in ("error_rate", "accuracy"):
        (tmp_path / f"{metric}.toml").write_text(BENCHMARK.replace("METRIC", metric))
    return tmp_path


def run(place, metric, *flags):
    command = ["-m", "keeplora", "run", "--benchmark", f"{metric}.toml", "--model", "model", "--output", metric, *flags]
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command], cwd=place, env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_what_another_package_brings_is_used_by_name_from_the_command_line(installed):
    scores = {}
    for metric in ("error_rate", "accuracy"):
        ended = run(installed, metric, "--method", "forgetful", "--rank", "2", "--epochs", "1", "--batch-size", "4")
        assert ended.returncode == 0, ended.stderr
        found = json.loads((installed / metric / "metrics.json").read_text())
        assert found["method"] == "forgetful"
        assert found["accuracy"] == [found["zero_shot"]], "what was trained was thrown away"
        scores[metric] = found["last"]
    assert scores["error_rate"] == pytest.approx(100 - scores["accuracy"])


@pytest.mark.slow
def test_an_unknown_name_lists_what_other_packages_bring(installed):
    ended = run(installed, "accuracy", "--method", "forgetfull")
    assert ended.returncode == 1
    assert "forgetful," in ended.stderr


def test_a_name_is_registered_once():
    registry = Registry("thing", {"one": 1})
    registry.register("two")(2)
    assert (registry.find("two"), list(registry)) == (2, ["one", "two"])
    with pytest.raises(ValueError, match="two things are registered as the thing 'one'; rename one"):
        registry.register("one")(3)
    assert registry.register("one")(1) == 1, "the same thing again, as when a module is reloaded"
    with pytest.raises(ValueError, match="unknown thing 'three'; known things: one, two"):
        registry.find("three")
