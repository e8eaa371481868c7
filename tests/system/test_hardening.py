"""What a hostile reader of the code found: each of these once went through in silence, or ended in a traceback."""

from collections import namedtuple
from types import MethodType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from keeplora import KeepLoRA, KeepLoRAConfig, LoRAFT, MethodConfig, RunConfig, TrainConfig, fit, load_stream
from keeplora.data.images import Examples
from keeplora.task import to_device

CONFIG = KeepLoRAConfig(rank=2, targets=("fc1", "fc2", "out"), weight_energy=0.5, feature_energy=0.8)


def test_training_the_base_weights_is_an_error():
    model, task = tiny.MLP(), tiny.VectorTask()
    method = KeepLoRA(CONFIG)
    adapted = method.before_task(model, task)
    with torch.no_grad():
        adapted.base_model.model.fc2.base_layer.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"weight 'fc2\.weight' of the base model was changed"):
        method.after_task(adapted, task)


def test_a_wrapper_of_half_precision_around_the_adapted_model_does_not_spoil_the_merge():
    model, task = tiny.MLP(), tiny.VectorTask()
    method = KeepLoRA(CONFIG)
    adapted = method.before_task(model, task)
    fit(adapted, task, TrainConfig(epochs=2, learning_rate=0.05))
    plain = adapted.forward

    def half(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*args)

    adapted.forward = MethodType(half, adapted)
    method.after_task(adapted, task)
    assert method.record.merge_error < 1e-5


def test_the_gradient_start_gives_the_weights_back_bit_by_bit():
    model, task = tiny.MLP(), tiny.VectorTask()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = KeepLoRA(KeepLoRAConfig(rank=2, targets=("fc1", "fc2"), weight_energy=0.5, b_start="gradient"))
    merged = method.after_task(method.before_task(model, task), task)
    # Nothing was trained, so b is what it started as, and the update is exactly nothing.
    for name, value in merged.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_task_of_one_step_learns():
    task = tiny.VectorTask(sizes=(8,))
    adapted = KeepLoRA(CONFIG).before_task(tiny.MLP(), task)
    before = task.loss(adapted, task.batches()[0]).item()
    fit(adapted, task, TrainConfig(epochs=1, learning_rate=0.05))
    assert task.loss(adapted, task.batches()[0]).item() < before - 1e-3


def test_a_model_with_a_missing_weight_is_refused(tmp_path):
    folder = tiny.save_dual_encoder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight .visual_projection\.weight."):
        load_stream(str(folder), str(tiny.write_benchmark(tmp_path / "data", tasks=1)))


def test_damaged_weights_are_named(tmp_path):
    folder = tiny.save_dual_encoder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x08" + b"\x00" * 40)
    with pytest.raises(ValueError, match=r"weights of model .* cannot be used"):
        load_stream(str(folder), str(tiny.write_benchmark(tmp_path / "data", tasks=1)))


@pytest.mark.parametrize("method", ["lora_ft", "keeplora"])
def test_a_run_takes_the_options_of_its_method(method):
    kind = type(RunConfig(method=method).options)
    assert kind is (KeepLoRAConfig if method == "keeplora" else MethodConfig)
    assert LoRAFT().config == MethodConfig()


def test_options_of_another_method_are_refused():
    with pytest.raises(ValueError, match="must be MethodConfig, not KeepLoRAConfig"):
        RunConfig(method="lora_ft", options=KeepLoRAConfig())


def test_one_name_is_not_a_tuple_of_names():
    with pytest.raises(ValueError, match="must be a tuple of names"):
        KeepLoRAConfig(targets="fc1")


def decoded(image):
    return np.asarray(Examples(("a",), (0,), lambda i: image, lambda i: "here").image(0))


def test_sixteen_bit_images_keep_their_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = decoded(Image.fromarray(ramp))[..., 0]
    assert len(np.unique(found)) > 200
    assert found.max() == 255


def test_transparent_parts_show_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    found = decoded(Image.fromarray(pixels))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[1, 1].tolist() == [255, 255, 255]


def test_floating_point_images_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        decoded(Image.fromarray(np.zeros((2, 2), np.float32)))


def test_a_named_tuple_of_tensors_stays_one():
    pair = namedtuple("pair", "x y")(torch.ones(2), torch.zeros(2))
    assert type(to_device(pair, torch.device("cpu"))) is type(pair)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_missing_model_folder_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"there is no such folder"):
        load_stream(name)
