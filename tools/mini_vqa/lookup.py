"""What attention learns first: to look up what was said with a word, to check it, and to find what it was said of.

In questions about images these are rarely practised. Here every second token is practice: eight pairs of words are
said, then asked for in another order, then checked (yes or no), then asked backwards. With its attention wired for it
(`wiring.py`) the model can do it with few words within 200 steps.
"""

import time

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from .canvas import COLOURS, SHAPES
from .language import vocabulary
from .model import has_bfloat16

PAIRS, ROWS, RATE = 8, 24, 1e-3
IGNORED = -100


def words_to_practise(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that are words of their own: colours, shapes, digits and letters first."""
    first = [*COLOURS, *SHAPES, *"0123456789", *"abcdef"]
    found = [tokenizer(word, add_special_tokens=False).input_ids for word in [*first, *vocabulary()]]
    return list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))


def practice(
    words: Tensor, marks: Tensor, number: int, generator: torch.Generator, between: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return sequences of tokens and their labels; `marks` are the tokens in front of the parts, then yes and no.

    `between` is a token that stands between the words of a pair where it is said: the dot behind an option's letter.
    """

    def shuffled(pairs: Tensor) -> Tensor:
        return pairs[torch.randperm(PAIRS, generator=generator)]

    rows, labels = [], []
    ask, check, back, yes, no = marks.tolist()
    for _ in range(number):
        pairs = words[torch.randperm(len(words), generator=generator)[: 2 * PAIRS]].view(PAIRS, 2)
        asked, checked, turned = shuffled(pairs), shuffled(pairs), shuffled(pairs).flip(1)
        true = torch.rand(PAIRS, generator=generator) < 0.5
        said = torch.where(true, checked[:, 1], shuffled(pairs)[:, 1])
        verdict = torch.where(said == checked[:, 1], yes, no)
        said_pairs = pairs
        if between is not None:
            said_pairs = torch.stack([pairs[:, 0], torch.full_like(pairs[:, 0], between), pairs[:, 1]], 1)
        parts = [
            (said_pairs, torch.full_like(said_pairs, IGNORED)),
            (asked, torch.stack([torch.full_like(asked[:, 0], IGNORED), asked[:, 1]], 1)),
            (
                torch.stack([checked[:, 0], said, verdict], 1),
                torch.stack([torch.full_like(said, IGNORED), torch.full_like(said, IGNORED), verdict], 1),
            ),
            (turned, torch.stack([torch.full_like(turned[:, 0], IGNORED), turned[:, 1]], 1)),
        ]
        ids, wanted = [], []
        for mark, (tokens, label) in zip((None, ask, check, back), parts, strict=True):
            if mark is not None:
                ids.append(torch.tensor([mark]))
                wanted.append(torch.tensor([IGNORED]))
            ids.append(tokens.flatten())
            wanted.append(label.flatten())
        rows.append(torch.cat(ids))
        labels.append(torch.cat(wanted))
    return torch.stack(rows), torch.stack(labels)


def teach(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Practise with the language model alone: with the first words, and then half of the time with more and more."""
    words = torch.tensor(words_to_practise(tokenizer))
    names = ("what", "is", "which", "yes", "no")
    marks = torch.tensor([tokenizer(name, add_special_tokens=False).input_ids[0] for name in names])
    words = words[~torch.isin(words, marks)]
    dot = tokenizer("a.", add_special_tokens=False).input_ids[-1]
    generator = torch.Generator().manual_seed(0)
    parameters = [*model.model.language_model.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    model.train()
    begun, few = time.time(), 36
    for step in range(steps):
        grown = max(0.0, (step / steps - 0.3) / 0.7)
        known = words[: few + int(grown * (len(words) - few))]
        between = dot if step % 2 else None
        halves = [practice(pool, marks, ROWS // 2, generator, between) for pool in (words[:few], known)]
        ids, labels = (torch.cat(parts) for parts in zip(*halves, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            states = model.model.language_model(input_ids=ids).last_hidden_state[:, :-1]
            wanted = labels[:, 1:]
            logits = model.lm_head(states[wanted != IGNORED])
        answers = wanted[wanted != IGNORED]
        loss = functional.cross_entropy(logits.float(), answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        share = min(1.0, (step + 1) / 50, 10 * (1 - step / steps))
        for group in optimiser.param_groups:
            group["lr"] = RATE * share
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(-1) == answers).view(2, -1, 3, PAIRS).float().mean((1, 3))
            told = "; ".join(
                f"{len(pool)} words: asked {100 * asked:.0f} %, checked {100 * checked:.0f} %, back {100 * back:.0f} %"
                for pool, (asked, checked, back) in zip((words[:few], known), right.tolist(), strict=True)
            )
            print(f"looking up, step {step + 1} of {steps} ({time.time() - begun:.0f} s), {told}", flush=True)
