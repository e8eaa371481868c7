"""Contrastive pre-training on CPU: images against a bank of captions, processes of one thread each."""

import math
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPModel

from . import augment, network
from .objective import Material, batch_of, captions_of, load, loss_of, pick
from .schedule import Schedule, rate_at

MAX_SCALE = math.log(100)


@torch.no_grad()
def first_table(model: CLIPModel, material: Material) -> nn.Parameter:
    """Return the text features of one caption of each concept: where the table starts."""
    ids = material.ids[torch.from_numpy(material.first)]
    with torch.autocast("cpu", torch.bfloat16):
        return nn.Parameter(torch.cat([network.text_features(model, part) for part in ids.split(256)]).clone())


def spread_texts(model: CLIPModel, material: Material, schedule: Schedule) -> None:
    """Teach the text side first that captions of one concept agree and those of others differ (all seeds are fixed).

    Without it all captions start with nearly the same features and the images learn little for many steps.
    """
    rng = np.random.default_rng(7)
    parameters = [p for name, p in model.named_parameters() if name.startswith("text")]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(schedule.text_steps):
        concepts = np.unique(pick(material.negatives, 192, rng))
        ids = torch.cat([captions_of(material, concepts, rng) for _ in "ab"])
        with torch.autocast("cpu", torch.bfloat16):
            features = network.text_features(model, ids)
        near = material.related[concepts][:, concepts].clone().fill_diagonal_(False)
        logits = (10 * features[: len(concepts)] @ features[len(concepts) :].T).masked_fill(near, -1e4)
        loss = functional.cross_entropy(logits, torch.arange(len(concepts)))
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate * min(1.0, (step + 1) / 50)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99 and dist.get_rank() == 0:
            print(f"text step {step + 1} loss {float(loss.detach()):.3f} of {math.log(len(concepts)):.3f}", flush=True)


def optimiser_of(model: nn.Module, table: nn.Parameter, schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW with decay on matrices alone."""
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": matrices, "weight_decay": schedule.decay},
        {"params": others, "weight_decay": 0.0},
        {"params": [table], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), fused=True)


def share_gradients(parameters: list[nn.Parameter], progress: float) -> float:
    """Average gradients over the processes, clip them to norm 1, and return the processes' mean progress."""
    grads = [p.grad for p in parameters]
    flat = torch.cat([*[g.reshape(-1) for g in grads], torch.tensor([progress])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    agreed = float(flat[-1])
    flat *= min(1.0, 1.0 / (float(flat[:-1].norm()) + 1e-6))
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()
    return agreed


def worker(rank: int, world: int, folder: str, schedule: Schedule, vocabulary: int) -> None:
    """Train one process's share until the time is up; process 0 writes averaged weights as it goes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    material = load(Path(folder))
    rng, generator = np.random.default_rng(100 + rank), torch.Generator().manual_seed(100 + rank)
    torch.manual_seed(0)
    first = batch_of(material, Schedule(minutes=1, batch=2000), np.random.default_rng(0))
    pool = augment.Pool(torch.Generator().manual_seed(0))
    model = network.build(vocabulary, augment.composites(*first[:3], pool, torch.Generator().manual_seed(0)))
    if schedule.start:
        model.load_state_dict(load_file(schedule.start))
    else:
        spread_texts(model, material, schedule)
    table = first_table(model, material)
    for parameter in [*model.parameters(), table]:
        dist.broadcast(parameter.data, 0)
    train(model, table, material, schedule, rng, generator, Path(folder) if rank == 0 else None)
    dist.destroy_process_group()


def train(
    model: CLIPModel,
    table: nn.Parameter,
    material: Material,
    schedule: Schedule,
    rng: np.random.Generator,
    generator: torch.Generator,
    folder: Path | None,
) -> None:
    """Run steps until the clock says stop; `folder` is where to save, if this process saves."""
    parameters = [*model.parameters(), table]
    pool = augment.Pool(generator)
    averaged, optimiser = deepcopy(model), optimiser_of(model, table, schedule)
    start = saved = time.time()
    progress, step, running = 0.0, 0, 6.0
    while progress < 1:
        loss = loss_of(model, table, material, schedule, pool, rng, generator, progress=progress)
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        progress = share_gradients(parameters, (time.time() - start) / (60 * schedule.minutes))
        for group in optimiser.param_groups:
            group["lr"] = rate_at(min(progress, 1.0), schedule)
        optimiser.step()
        step, running = step + 1, 0.98 * running + 0.02 * float(loss.detach())
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_SCALE)
            decay = min(schedule.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        if folder is not None and (time.time() - saved > schedule.save_every or progress >= 1):
            saved = time.time()
            save_file(
                {name: value.contiguous() for name, value in averaged.state_dict().items()},
                folder / "checkpoint.part",
            )
            (folder / "checkpoint.part").replace(folder / "checkpoint.safetensors")
        if folder is not None and (step % 250 == 0):
            seen = step * schedule.batch * dist.get_world_size()
            speed = seen / (time.time() - start)
            scale = float(model.logit_scale.detach().exp())
            print(
                f"{progress:.3f} step {step} seen {seen} at {speed:.0f}/s loss {running:.3f} scale {scale:.1f}",
                flush=True,
            )


def run(folder: Path, schedule: Schedule, vocabulary: int, *, processes: int = 2) -> None:
    """Train in `processes` processes; the averaged weights end in `folder/checkpoint.safetensors`."""
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, (processes, str(folder), schedule, vocabulary), nprocs=processes)
