"""Pre-training on the general mix, by steps: it can be stopped, and taken up with as many processes as one likes.

A row is a picture with several questions; each of them sees the picture and itself alone, as when it is asked alone. At
first most pictures are told in words in place of the image: what is to be found out is learned before how to see it.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from .general import picture
from .language import board, words
from .model import IMAGE_TOKENS, has_bfloat16
from .muon import Muon
from .questions import Question
from .scenes import scene

ROWS, AT_ONCE, QUESTIONS = 8, 8, 9
RATE, MATRIX_RATE, WARM_UP, DECAY = 1e-3, 3e-3, 200, 0.05
VISION = 0.3  # Of these rates, for the tower, which can see already.
TOLD_FIRST, TOLD_UNTIL = 0.08, 0.2  # Shares of the steps: up to which nothing is seen, from which most is.
WORDS, LATER_WORDS, LATER_TOLD = 0.4, 0.1, 0.04  # Shares of the rows: without a picture, at first and later; told.
BOARDS = 0.6  # Of those without a picture: lists in which much is looked up.
AVERAGE = 0.999
SAVE_EVERY = 250
IGNORED = -100
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # What the optimisers keep of a weight.

Row = tuple[Image.Image | str | None, list[Question]]
"""What is shown, as an image or in words, or nothing; and what is asked of it."""


@dataclass(frozen=True)
class Marks:
    """The numbers of the special tokens."""

    pad: int
    end: int
    image: int
    user: int
    assistant: int


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Return the numbers of the special tokens of a tokenizer."""
    names = ("<pad>", "</s>", "<image>", "<user>", "<assistant>")
    return Marks(*(tokenizer.convert_tokens_to_ids(name) for name in names))


class Rows:
    """Makes batches of pictures with packed questions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self.marks = tokenizer, marks_of(tokenizer)
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, from memory if it was seen."""
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def batch(self, rows: list[Row]) -> dict[str, Tensor | None]:
        """Return the tensors of a batch: each question attends to what is in front, and to itself."""
        marks = self.marks
        packed = []
        for shown, questions in rows:
            seen = self.ids(shown) if isinstance(shown, str) else [marks.image] * (IMAGE_TOKENS if shown else 0)
            front = [marks.user, *seen]
            ids, labels, places, block = [*front], [IGNORED] * len(front), [*range(len(front))], [0] * len(front)
            weights = [0.0] * len(front)
            for number, question in enumerate(questions, 1):
                asked = [*self.ids(question.text), marks.assistant]
                answer = [*self.ids(question.answer), marks.end]
                ids += asked + answer
                labels += [IGNORED] * len(asked) + answer
                places += range(len(front), len(front) + len(asked) + len(answer))
                block += [number] * (len(asked) + len(answer))
                weights += [0.0] * len(asked) + [weight_of(len(answer))] * len(answer)
            packed.append((ids, labels, places, block, weights))
        longest = max(len(ids) for ids, *_ in packed)

        def padded(which: int, value: float) -> Tensor:
            return torch.tensor([one[which] + [value] * (longest - len(one[which])) for one in packed])

        block = padded(3, -1)
        same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
        before = torch.ones(longest, longest, dtype=torch.bool).tril()
        images = [shown for shown, _ in rows if isinstance(shown, Image.Image)]
        return {
            "input_ids": padded(0, marks.pad),
            "labels": padded(1, IGNORED),
            "weights": padded(4, 0.0),
            "position_ids": padded(2, 0),
            "attention_mask": (same & before)[:, None],
            "pixel_values": pixels(images) if images else None,
        }


def weight_of(length: int) -> float:
    """Return the weight of each token of an answer: a letter counts for more than a word of a list."""
    return length**-0.5


def pixels(images: list[Image.Image]) -> Tensor:
    """Return images as the processor does: from -1 to 1."""
    array = np.stack([np.asarray(image) for image in images])
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def _row(step: int, number: int, progress: float) -> Row:
    """Return a row of a step, the same whoever makes it."""
    rng = Random(f"{step}/{number}")
    early = min(1.0, max(0.0, (TOLD_UNTIL - progress) / (TOLD_UNTIL - TOLD_FIRST)))
    without = LATER_WORDS + early * (WORDS - LATER_WORDS)
    told = LATER_TOLD + early * (1 - WORDS - LATER_TOLD)
    draw = rng.random()
    if draw < without:
        made = board(rng) if rng.random() < BOARDS else words(rng)
    else:
        made = scene(rng) if draw < without + told else picture(rng, "train")
    if made.image is None or draw < without + told:
        asked = [question for question in made.questions if not made.told or question.kind in made.told]
        return made.description or None, rng.sample(asked, min(QUESTIONS + 3, len(asked)))
    return made.image, rng.sample(made.questions, min(QUESTIONS, len(made.questions)))


def rate_at(step: int, steps: int) -> float:
    """Return the share of the learning rate: a warm-up, then half a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def loss_of(model: LlavaForConditionalGeneration, batch: dict[str, Tensor | None], total: float) -> Tensor:
    """Return the loss: the weighted sum over answer tokens, by `total`."""
    labels, weights = batch["labels"], batch["weights"]
    assert labels is not None
    assert weights is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
        inputs = {
            name: tensor for name, tensor in batch.items() if name not in ("labels", "weights") and tensor is not None
        }
        states = model.model(**inputs).last_hidden_state[:, :-1]
        answered = labels[:, 1:] != IGNORED
        logits = model.lm_head(states[answered])
    losses = functional.cross_entropy(logits.float(), labels[:, 1:][answered], reduction="none")
    return (losses * weights[:, 1:][answered]).sum() / total


class State:
    """The model, the average of its weights, the optimiser, and how many steps were made; kept in a folder."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model, self.step = model.train(), 0
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and "embed" not in name
            groups.setdefault((is_matrix, "vision_tower" in name), []).append(parameter)

        def rated(is_matrix: bool, rate: float) -> list[dict[str, object]]:
            rates = {False: rate, True: rate * VISION}
            return [{"params": groups[is_matrix, seeing], "rate": rates[seeing]} for seeing in (False, True)]

        muon = Muon(rated(True, MATRIX_RATE))
        adam = torch.optim.AdamW(rated(False, RATE), lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY, fused=True)
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (muon, adam)

    @classmethod
    def load(cls, work: Path) -> "State":
        """Return the state of the last stretch, or the first one."""
        state = cls(LlavaForConditionalGeneration.from_pretrained(work / "untrained"))
        if not (work / "state.safetensors").exists():
            return state
        kept = load_file(work / "state.safetensors")
        state.step = int(kept["step"])
        owner = {
            parameter: optimiser
            for optimiser in state.optimisers
            for group in optimiser.param_groups
            for parameter in group["params"]
        }
        for (name, parameter), average in zip(state.model.named_parameters(), state.average, strict=True):
            with torch.no_grad():
                parameter.copy_(kept[f"weight.{name}"])
                average.copy_(kept[f"average.{name}"])
            # None of a weight that is not used: the tower's last norm.
            if moments := {key: kept[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in kept}:
                owner[parameter].state[parameter] = moments
        return state

    def save(self, work: Path) -> None:
        """Keep all of it."""
        kept = {"step": torch.tensor(self.step)}
        for (name, parameter), average in zip(self.model.named_parameters(), self.average, strict=True):
            kept |= {f"weight.{name}": parameter.detach(), f"average.{name}": average}
            for optimiser in self.optimisers:
                moments = optimiser.state.get(parameter, {})
                kept |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
        save_file(kept, work / "state.part")
        os.replace(work / "state.part", work / "state.safetensors")

    def update(self, share: float) -> None:
        """Make a step with the gradients that are there."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * share
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(AVERAGE, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - decay)

    def averaged(self) -> LlavaForConditionalGeneration:
        """Put the averaged weights into the model, and return it."""
        with torch.no_grad():
            for parameter, average in zip(self.model.parameters(), self.average, strict=True):
                parameter.copy_(average)
        return self.model


def pretrain(work: Path, processor: LlavaProcessor, *, steps: int, minutes: float) -> bool:
    """Train until all steps are made, or for so many minutes; return whether it is finished.

    Started by `torchrun --nproc-per-node 2` two processes share each batch; the steps are the same.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if ranks > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    rows, state, begun = Rows(processor.tokenizer), State.load(work), time.time()
    losses: list[float] = []
    while state.step < steps:
        losses.append(_learn(state, rows, steps, rank, ranks))
        if state.step % SAVE_EVERY == 0 or state.step == steps:
            if rank == 0:
                state.save(work)
                _tell(work, state.step, losses, time.time() - begun)
            losses.clear()
            if _agreed(time.time() - begun > 60 * minutes):
                break
    return state.step >= steps


def _learn(state: State, rows: Rows, steps: int, rank: int, ranks: int) -> float:
    """Make one step with this process's part of the batch; return its part of the loss."""
    mine = [_row(state.step, number, state.step / steps) for number in range(rank, ROWS, ranks)]
    lengths = [len(rows.ids(question.answer)) + 1 for _, asked in mine for question in asked]
    total = torch.tensor(sum(length * weight_of(length) for length in lengths))
    if ranks > 1:
        dist.all_reduce(total)
    loss = 0.0
    for start in range(0, len(mine), AT_ONCE):
        part = loss_of(state.model, rows.batch(mine[start : start + AT_ONCE]), total.item())
        part.backward()
        loss += part.item()
    if ranks > 1:
        parameters = list(state.model.parameters())
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
            # Of words alone, the eyes have none anywhere.
            parameter.grad = part.view_as(parameter) if part.any() else None
    state.update(rate_at(state.step, steps))
    return loss * ranks


def _agreed(enough: bool) -> bool:
    """Return what the first process says."""
    if not dist.is_initialized():
        return enough
    said = torch.tensor(int(enough))
    dist.broadcast(said, 0)
    return bool(said)


def _tell(work: Path, step: int, losses: list[float], seconds: float) -> None:
    line = {"step": step, "loss": round(sum(losses) / len(losses), 4), "seconds": round(seconds)}
    with (work / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(line, flush=True)
