"""Time one phase of one system in this process, and print seconds and peak memory as JSON; `phases.py` calls it.

    python benchmarks/one_phase.py --system keeplora --phase gradient --workload mini
    python benchmarks/one_phase.py --system keeplora --phase step --workload vit_b16 --images 64 --profile 25

What a phase needs from earlier ones (bases, gradients) is made before the clock starts, the same for every system, and
is kept in a folder if one is given. With `--profile` torch's profiler watches, and the slowest operations are printed.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import naive
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.gradients import mean_gradients, residuals_of
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.names import tower_share
from keeplora.methods.base import Method, MethodConfig
from keeplora.methods.baselines import LoRAFT
from keeplora.methods.keeplora import KeepLoRA
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace import protected
from keeplora.task import Task
from keeplora.training.profiling import Costs, measured
from keeplora.training.trainer import TrainConfig, fit
from workloads import Workload, WorkloadConfig, load, require_cpu

SystemName = Literal["keeplora", "lora_ft", "naive"]
PhaseName = Literal[
    "bases", "gradient", "initialise", "step", "watched_step", "merge", "features", "update", "evaluate", "task"
]
Part = tuple[float, Callable[[], object]]
"""How many times a part counts, and the part: a phase that is the same for many layers may be run on some of them."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(WorkloadConfig):
    """One measurement."""

    system: SystemName = "keeplora"
    """keeplora and lora_ft: the library's methods; naive: `naive.py`."""
    phase: PhaseName | Literal["prepare"] = "gradient"
    """What to time; prepare only makes what the others need."""
    sample_layers: int | None = None
    """Run bases, update and naive's initialise on so many layers of each shape, and scale up to all of them."""
    naive_features: naive.Features = "batch_mean"
    """How naive keeps its token matrices."""
    epochs: int = 1
    """Epochs of `task`."""
    prepared: Path | None = None
    """Folder for what the phases need from earlier ones."""
    profile: int = 0
    """Print so many rows of the profile."""


@dataclass(frozen=True)
class Given:
    """A workload, and what earlier phases would have left."""

    config: PhaseConfig
    workload: Workload = field(repr=False)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The target weights."""
        return {name: self.workload.model.get_parameter(f"{name}.weight") for name in self.workload.targets}

    @cached_property
    def shares(self) -> dict[str, float]:
        """The energy share of each layer's principal subspace."""
        return {name: tower_share(name, self.workload.options.weight_energy) for name in self.workload.targets}

    @cached_property
    def bases(self) -> dict[str, Tensor]:
        """The principal bases, and what the tasks learned before added to them."""
        return self._kept("bases", self._bases)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of a few examples; how long it takes to work with them does not depend on how many."""
        few = Few(self.workload.task, 8)
        return self._kept("gradients", lambda: mean_gradients(self.workload.model, few, self.workload.targets))

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        """The input grams of a few examples."""
        few = Few(self.workload.task, 8)
        return self._kept("grams", lambda: input_grams(self.workload.model, few, self.workload.targets))

    def forget_gradients(self) -> None:
        """Let go of what a run would no longer hold once the adapted model is made."""
        self.__dict__.pop("gradients", None)

    def groups(self, sample: int | None) -> list[tuple[float, list[str]]]:
        """Return layers of equal work, as many of each kind as the sample says, and how many times they count."""
        kinds: dict[object, list[str]] = {}
        for name in self.workload.targets:
            kinds.setdefault((name.split(".")[0], self.weights[name].shape), []).append(name)
        chosen = [(names, names[:sample]) for names in kinds.values()]
        return [(len(names) / len(some), some) for names, some in chosen]

    def _bases(self) -> dict[str, Tensor]:
        principal = protected.principal_bases(self.weights, self.shares)
        generator = torch.Generator().manual_seed(self.config.seed)
        return {name: _filled(basis, self.config.learned_tasks, generator) for name, basis in principal.items()}

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        folder = self.config.prepared
        if folder is None:
            return make()
        file = folder / f"{name}.safetensors"
        if not file.exists():
            save_file({key: value.contiguous().clone() for key, value in make().items()}, file)
        return load_file(file)


def _filled(basis: Tensor, num_tasks: int, generator: torch.Generator) -> Tensor:
    """Return a basis with the random directions of so many tasks, of which 16 would fill all that it leaves."""
    d_in, k = basis.shape
    added = torch.randn(d_in, min(16, num_tasks) * (d_in - k) // 16, generator=generator)
    return linalg.extend(basis, nn.functional.normalize(added, dim=0))


class Few(Task):
    """The first examples of a task's first batch."""

    def __init__(self, task: Task, count: int) -> None:
        self.name = task.name
        self.task = task
        self.count = count
        self.padding_mask = task.padding_mask  # type: ignore[method-assign]
        self.frozen = task.frozen  # type: ignore[method-assign]

    def batches(self) -> list[dict[str, Tensor]]:
        """Return one small batch."""
        batch = next(iter(self.task.batches()))
        return [{key: value[: self.count] for key, value in batch.items()}]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the task's loss."""
        return self.task.loss(model, batch)

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the size of the batch."""
        return len(next(iter(batch.values())))


def main(config: tyro.conf.OmitArgPrefixes[PhaseConfig]) -> None:
    """Time the phase and print what was measured."""
    require_cpu()
    print(json.dumps(measure(config)))


def measure(config: PhaseConfig, workload: Workload | None = None) -> dict[str, float]:
    """Return the seconds and the peak memory of a phase, in how many units it works, and what stood before it.

    `cpu_seconds` are those of all threads together: they tell more where other processes share the machine. The
    workload is made if it is not given; initialise, step and merge change its model.
    The unit is an example for gradient, features and evaluate, a step for both kinds of step, and the whole for the
    others.
    """
    torch.manual_seed(config.seed)
    if config.prepared is not None:
        config.prepared.mkdir(parents=True, exist_ok=True)
    given = Given(config, workload or load(config))
    if config.phase == "prepare":
        return {"layers": len(given.bases) + len(given.gradients) + len(given.grams)}
    parts = PHASES[config.phase][config.system](given)
    if config.phase in ("bases", "update"):
        parts[0][1]()  # What the libraries set up on first use must not be timed, least of all scaled up.
    else:
        _warm_up(given)
    before: Costs = {}
    with measured(before, "before"):
        pass
    phases: Costs = {}
    seconds = cpu_seconds = 0.0
    with measured(phases, "phase"), _profiled(config.profile):
        for count, part in parts:
            since, cpu_since = time.perf_counter(), time.process_time()
            part()
            seconds += count * (time.perf_counter() - since)
            cpu_seconds += count * (time.process_time() - cpu_since)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "units": float(_units(given)),
        "peak_memory_mb": phases["phase"]["peak_memory_mb"],
        "memory_before_mb": before["before"]["peak_memory_mb"],
        "scaled_from_sample": float(any(count != 1 for count, _ in parts)),
    }


def _units(given: Given) -> int:
    config = given.config
    if config.phase in ("step", "watched_step"):
        return sum(1 for _ in given.workload.task.batches())
    if config.phase in ("gradient", "features"):
        return sum(given.workload.task.weight(batch) for batch in given.workload.task.batches())
    if config.phase == "evaluate":
        return sum(len(given.workload.task.references(batch)) for batch in given.workload.task.test_batches())
    return 1


def _warm_up(given: Given) -> None:
    """Run the libraries once on little data, so that what they set up on first use is not timed."""
    few = Few(given.workload.task, 2)
    with torch.no_grad():
        few.loss(given.workload.model, few.batches()[0])
    torch.linalg.svd(torch.randn(64, 32), full_matrices=False)
    torch.linalg.eigh(torch.eye(32))
    torch.linalg.qr(torch.randn(64, 32))


@contextmanager
def _profiled(rows: int) -> Iterator[None]:
    if rows == 0:
        yield
        return
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield
    table = profiler.key_averages(group_by_input_shape=True).table(
        sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40, max_shapes_column_width=60
    )
    print(table)


def keeplora_bases(given: Given) -> list[Part]:
    """Find the principal bases by the library."""
    return _by_layers(given, lambda names: protected.principal_bases(_of(given.weights, names), given.shares))


def naive_bases(given: Given) -> list[Part]:
    """Find the principal bases by SVD."""
    return _by_layers(given, lambda names: naive.principal_bases(_of(given.weights, names), given.shares))


def keeplora_gradient(given: Given) -> list[Part]:
    """Take the mean gradient by the library."""
    workload = given.workload
    return [(1, lambda: mean_gradients(workload.model, workload.task, workload.targets))]


def naive_gradient(given: Given) -> list[Part]:
    """Take the mean gradient of all parameters."""
    workload = given.workload
    return [(1, lambda: naive.mean_gradients(workload.model, workload.padded, workload.targets))]


def keeplora_initialise(given: Given) -> list[Part]:
    """Make the adapted model from the gradient by the library."""
    method = _keeplora(given)
    return [(1, lambda: method.before_task(given.workload.model, given.workload.task))]


def lora_ft_initialise(given: Given) -> list[Part]:
    """Make PEFT's own adapted model."""
    method = _lora_ft(given)
    return [(1, lambda: method.before_task(given.workload.model, given.workload.task))]


def naive_initialise(given: Given) -> list[Part]:
    """Make the start of A and B by SVD; putting the layers in place takes no time."""
    gradients, bases, rank = given.gradients, given.bases, given.workload.options.rank
    return _by_layers(given, lambda names: naive.start(_of(gradients, names), bases, rank))


def library_step(make: Callable[[Given], Method]) -> Callable[[Given], list[Part]]:
    """Return the phase that trains for one epoch by the library."""

    def phase(given: Given) -> list[Part]:
        method = make(given)
        adapted = method.before_task(given.workload.model, given.workload.task)
        _let_go(method, given)
        config = TrainConfig(epochs=1, batch_size=given.config.batch_size)
        training_task = method.training_task(adapted, given.workload.task, config.epochs)
        return [(1, lambda: fit(adapted, training_task, config, penalty=method.penalty))]

    return phase


def watching(given: Given) -> KeepLoRA:
    """Return the method that collects its features in the last epoch of training."""
    return _keeplora(given, features="last_epoch")


def naive_step(given: Given) -> list[Part]:
    """Train for one epoch in a plain loop."""
    adapted = naive.attach(given.workload.model, naive_factors(given), naive_scaling(given))
    return [(1, lambda: naive.fit(adapted, given.workload.padded, epochs=1))]


def library_merge(make: Callable[[Given], Method]) -> Callable[[Given], list[Part]]:
    """Return the phase that merges by the library, with its checks and the certificate; features are made before."""

    def phase(given: Given) -> list[Part]:
        method = make(given)
        adapted = method.before_task(given.workload.model, given.workload.task)
        _let_go(method, given)
        return [(1, lambda: method.after_task(adapted, given.workload.task))]

    return phase


def naive_merge(given: Given) -> list[Part]:
    """Add the updates to the weights."""
    adapted = naive.attach(given.workload.model, naive_factors(given), naive_scaling(given))
    return [(1, lambda: naive.merge(adapted))]


def keeplora_features(given: Given) -> list[Part]:
    """Accumulate the input grams by the library."""
    workload = given.workload
    return [(1, lambda: input_grams(workload.model, workload.task, workload.targets))]


def naive_features(given: Given) -> list[Part]:
    """Keep the token matrices."""
    workload, features = given.workload, given.config.naive_features
    return [(1, lambda: naive.token_matrices(workload.model, workload.padded, workload.targets, features=features))]


def keeplora_update(given: Given) -> list[Part]:
    """Find the directions to protect by the library, from grams."""
    groups = given.groups(given.config.sample_layers)
    grams = {name: rows.T @ rows for _, names in groups for name in names for rows in [_rows_of(given, name)]}
    bases, share = given.bases, given.workload.options.feature_energy
    return _by_layers(given, lambda names: protected.new_directions(_of(bases, names), grams, share))


def naive_update(given: Given) -> list[Part]:
    """Find the directions to protect by SVD of token matrices, made with the second moment of real ones."""
    groups = given.groups(given.config.sample_layers)
    matrices = {name: _rows_of(given, name).T for _, names in groups for name in names}
    bases, share = given.bases, given.workload.options.feature_energy
    return _by_layers(given, lambda names: naive.new_directions(_of(bases, names), matrices, share))


def library_evaluate(given: Given) -> list[Part]:
    """Evaluate the task by the library."""
    return [(1, lambda: evaluate(given.workload.model, [given.workload.task]))]


def naive_evaluate(given: Given) -> list[Part]:
    """Evaluate the task with the prompts encoded for every batch."""
    return [(1, lambda: naive.evaluate(given.workload.model, given.workload.padded))]


def library_task(make: Callable[[Given], Method]) -> Callable[[Given], list[Part]]:
    """Return the phase that learns a task from its beginning to its end by the library, and evaluates it."""

    def learn(given: Given, method: Method) -> None:
        model, task = given.workload.model, given.workload.task
        adapted = method.before_task(model, task)
        config = TrainConfig(epochs=given.config.epochs, batch_size=given.config.batch_size)
        fit(adapted, method.training_task(adapted, task, config.epochs), config, penalty=method.penalty)
        evaluate(method.after_task(adapted, task), [task])

    return lambda given: [(1, partial(learn, given, make(given)))]


def naive_task(given: Given) -> list[Part]:
    """Do the same in the naive way."""
    workload, options = given.workload, given.workload.options
    bases, targets = given.bases, workload.targets

    def learn() -> None:
        gradients = naive.mean_gradients(workload.model, workload.padded, targets)
        factors = naive.start(gradients, bases, options.rank)
        del gradients
        workload.model.zero_grad()
        adapted = naive.attach(workload.model, factors, naive_scaling(given))
        naive.fit(adapted, workload.padded, epochs=given.config.epochs)
        model = naive.merge(adapted)
        del factors
        matrices = naive.token_matrices(model, workload.padded, targets, features=given.config.naive_features)
        naive.new_directions(bases, matrices, options.feature_energy)
        naive.evaluate(model, workload.padded)

    return [(1, learn)]


def naive_factors(given: Given) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of the library's start: of the same shapes as naive's, and made faster."""
    method = _keeplora(given)
    adapted = method.before_task(copy.deepcopy(given.workload.model), given.workload.task)
    factors = {name: (adapted.get_parameter(f"base_model.model.{name}.lora_A.default.weight"),
                      adapted.get_parameter(f"base_model.model.{name}.lora_B.default.weight"))
               for name in given.workload.targets}  # fmt: skip
    given.forget_gradients()
    return {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}


def naive_scaling(given: Given) -> float:
    """Return alpha / rank."""
    return given.workload.options.alpha / given.workload.options.rank


def _keeplora(given: Given, **options: Any) -> KeepLoRA:
    """Return the method with what it would have found before; the features of its task add no direction."""
    method = KeepLoRA(dataclasses.replace(given.workload.options, **options))
    method.bases = dict(given.bases)
    none = {name: basis[:, :0] for name, basis in method.bases.items()}
    gradients = given.gradients
    method.gradient = lambda model, task: residuals_of(dict(gradients), method.bases)
    method.features = lambda model, task: none
    return method


def _protecting(given: Given) -> KeepLoRA:
    """Return the method with the bases that earlier tasks left, and nothing found of this one."""
    method = KeepLoRA(given.workload.options)
    method.bases = dict(given.bases)
    return method


def _let_go(method: Method, given: Given) -> None:
    """Forget the gradients, as a run has; the features still add no direction."""
    given.forget_gradients()
    vars(method).pop("gradient", None)  # It held them too.
    none = {name: basis[:, :0] for name, basis in given.bases.items()} if isinstance(method, KeepLoRA) else {}
    method.features = lambda model, task: none


def _lora_ft(given: Given) -> LoRAFT:
    options = given.workload.options
    return LoRAFT(MethodConfig(rank=options.rank, alpha=options.alpha, targets=options.targets))


def _rows_of(given: Given, name: str) -> Tensor:
    """Return as many random rows as naive would keep, with the second moment of the layer's real inputs."""
    energies, directions = torch.linalg.eigh(given.grams[name])
    workload, config = given.workload, given.config
    batches = 1 if config.naive_features == "batch_mean" else -(-config.images // config.batch_size)
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.randn(batches * workload.rows(name), len(energies), generator=generator)
    shaped: Tensor = (rows * energies.clamp_min(0).sqrt()) @ directions.T
    return shaped


def _by_layers(given: Given, work: Callable[[list[str]], object]) -> list[Part]:
    return [(count, partial(work, names)) for count, names in given.groups(given.config.sample_layers)]


def _of(values: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: values[name] for name in names}


PHASES: dict[str, dict[str, Callable[[Given], list[Part]]]] = {
    "bases": {"keeplora": keeplora_bases, "naive": naive_bases},
    "gradient": {"keeplora": keeplora_gradient, "naive": naive_gradient},
    "initialise": {"keeplora": keeplora_initialise, "lora_ft": lora_ft_initialise, "naive": naive_initialise},
    "step": {"keeplora": library_step(_keeplora), "lora_ft": library_step(_lora_ft), "naive": naive_step},
    "watched_step": {"keeplora": library_step(watching)},
    "merge": {"keeplora": library_merge(_keeplora), "lora_ft": library_merge(_lora_ft), "naive": naive_merge},
    "features": {"keeplora": keeplora_features, "naive": naive_features},
    "update": {"keeplora": keeplora_update, "naive": naive_update},
    "evaluate": {"keeplora": library_evaluate, "lora_ft": library_evaluate, "naive": naive_evaluate},
    "task": {"keeplora": library_task(_protecting), "lora_ft": library_task(_lora_ft), "naive": naive_task},
}
"""What each system does in each phase."""


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
