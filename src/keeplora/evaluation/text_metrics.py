"""Rules that judge one answer in words, from 0 to 1; `p` is the prediction, and the reference a record with an answer.

Those of MLLM-DCL and UCIT are the rules of the benchmarks' public code (MCITlib, `llava/eval/CoIN/eval_*.py`), as they
are: lenient ones stay lenient, so that scores can be compared with published ones.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import PurePosixPath
from typing import Any

Rule = Callable[[str, Any], float]
Metric = Callable[[Sequence[Any], Sequence[Any]], float]
Grams = Counter[tuple[str, ...]]  # Sequences of words, and how often each comes.


def by_answer(rule: Rule) -> Metric:
    """Return the metric that is the mean of a rule over all answers, in percent."""

    @wraps(rule)
    def metric(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        return 100.0 * sum(rule(*pair) for pair in zip(predictions, references, strict=True)) / len(predictions)

    return metric


SCIENCE_SETS = ("AI2D", "TQA", "VQA", "SciVerse")
"""The sets of MLLM-DCL's science task, told by their images' names, whose answers are compared as a whole."""

NUMBER_WORDS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
             "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip


@by_answer
def exact_match(p: str, reference: Any) -> float:
    """Compare the words alone: not case, articles, punctuation, nor blanks (as in SQuAD)."""
    return float(_words(p) == _words(reference.answer))


@by_answer
def contains(p: str, reference: Any) -> float:
    """Look for the answer anywhere in the prediction, whatever the case (MLLM-DCL Med: eval_pvqa)."""
    return float(reference.answer.lower() in p.lower())


@by_answer
def choice_letter(p: str, reference: Any) -> float:
    """Compare the letters of options: `B`, `(b)`, `B. the word`, `Answer: B`."""
    return float(_letter(p) == _letter(reference.answer) != "")


@by_answer
def relaxed_accuracy(p: str, reference: Any) -> float:
    """Allow numbers to be off by 5 % (ChartQA); compare anything else as `exact_match` does."""
    wanted, found = (_number(text) for text in (reference.answer, p))
    if wanted is None or found is None:
        return float(_words(p) == _words(reference.answer))
    return float(abs(found - wanted) <= 0.05 * abs(wanted))


@by_answer
def anls(p: str, reference: Any) -> float:
    """Return 1 less the share of letters to change (DocVQA's ANLS), and 0 below a half."""
    one, other = p.lower().strip(), reference.answer.lower().strip()
    similarity = 1 - _edits(one, other) / max(len(one), len(other), 1)
    return similarity if similarity >= 0.5 else 0.0


@by_answer
def rouge_l(p: str, reference: Any) -> float:
    """Return the harmonic mean of the shares of both texts' words that are in their longest common subsequence."""
    found, wanted = p.lower().split(), reference.answer.lower().split()
    common = _common(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


@by_answer
def mllm_dcl_open(p: str, reference: Any) -> float:
    """Judge MLLM-DCL RS and AD (eval_ai2d): the answer as a part of the prediction, next to a blank, dot or comma."""
    if "Unanswerable" in p:
        return 0.0
    p, wanted = p.lower(), reference.answer.lower()
    if " " in wanted:
        return float(wanted in p)
    wanted = wanted.replace(".", "")
    if " " in p:
        return float(any(one in p for one in (f" {wanted}", f"{wanted} ", f"{wanted}.", f"{wanted},")))
    return float(wanted in p)


@by_answer
def mllm_dcl_sci(p: str, reference: Any) -> float:
    """Judge MLLM-DCL Sci (eval_sci): by the set that the image's name tells; of states, the share that is found."""
    if "Unanswerable" in p:
        return 0.0
    if PurePosixPath(reference.place).name.split("_")[0] in SCIENCE_SETS:
        return float(p.lower() == reference.answer.lower())
    if "Which states" in reference.question:
        wanted, found = reference.answer.split(","), p.split(",")
        return sum(one in found for one in wanted) / len(wanted)
    return float(reference.answer in p)


@by_answer
def mllm_dcl_fin(p: str, reference: Any) -> float:
    """Judge MLLM-DCL Fin (eval_finvis): without blanks and dots, whatever the prediction's case."""
    return float(p.lower().replace(" ", "").replace(".", "") == reference.answer.lower())


@by_answer
def equal_ignoring_case(p: str, reference: Any) -> float:
    """Judge UCIT's questions (eval_deepseek_r1): equal but for the case."""
    return float(p.upper() == reference.answer.upper())


@by_answer
def first_character(p: str, reference: Any) -> float:
    """Compare the first characters (TRACE ScienceQA), whatever the case: the rest of an answer is its reason."""
    return float(p.strip()[:1].lower() == reference.answer.strip()[:1].lower() != "")


@by_answer
def edit_similarity(p: str, reference: Any) -> float:
    """Return the share of both texts' characters in their longest common subsequence (TRACE Py150, CodeXGLUE)."""
    one, other = (list(re.sub("<(NUM|STR|CHAR)_LIT(:[^>]*)?>", "", text).strip()) for text in (p, reference.answer))
    return 2 * _common(one, other) / (len(one) + len(other)) if one or other else 1.0


@by_answer
def sari(p: str, reference: Any) -> float:
    """Return the mean of what was rightly kept, left out and added of the question's text (Xu et al., 2016).

    Each is over sequences of one to four words, as in the library evaluate but for its splitting of words.
    """
    texts = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in (reference.question, p, reference.answer)]
    return sum(sum(_sari(*(_grams(text, n) for text in texts))) / 3 for n in range(1, 5)) / 4


TEXT_METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "contains": contains,
    "choice_letter": choice_letter,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "rouge_l": rouge_l,
    "mllm_dcl_open": mllm_dcl_open,
    "mllm_dcl_sci": mllm_dcl_sci,
    "mllm_dcl_fin": mllm_dcl_fin,
    "equal_ignoring_case": equal_ignoring_case,
    "first_character": first_character,
    "edit_similarity": edit_similarity,
    "sari": sari,
}
"""Means of the rules, in percent, by name."""


def _words(text: str) -> str:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()) or " ".join(plain.split())


def _letter(text: str) -> str:
    found = re.match(r"\s*(?:the\s+)?(?:answer\s*(?:is|:)?\s*)?\(?([a-z])\)?(?:[\s.:,)]|$)", text.lower())
    return found[1] if found else ""


def _number(text: str) -> float | None:
    plain = text.strip().lower().rstrip(".").replace(",", "").removeprefix("$")
    is_share = plain.endswith("%")
    try:
        value = float(NUMBER_WORDS.get(plain, plain).removesuffix("%").strip())
    except ValueError:
        return None
    return value / 100 if is_share else value


def _edits(one: str, other: str) -> int:
    """Return how many letters to change, add or leave out make one text the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != wanted))
    return row[-1]


def _grams(words: list[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _sari(source: Grams, found: Grams, wanted: Grams) -> tuple[float, float, float]:
    """Return the F1 of keeping, the precision of leaving out, the F1 of adding; nothing to do is done right."""
    kept, to_keep = source & found, source & wanted
    right = kept & wanted
    precision = sum(right[gram] / kept[gram] for gram in right) / len(kept) if kept else 1.0
    recall = right.total() / to_keep.total() if to_keep else 1.0
    left_out = source - found
    rightly = left_out - wanted
    leaving = sum(rightly[gram] / left_out[gram] for gram in rightly) / len(left_out) if left_out else 1.0
    added, to_add = found.keys() - source.keys(), wanted.keys() - source.keys()
    hits = len(added & to_add)
    adding = _f1(hits / len(added) if added else 1.0, hits / len(to_add) if to_add else 1.0)
    return _f1(precision, recall), leaving, adding


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _common(one: list[str], other: list[str]) -> int:
    """Return how many words the longest common subsequence has."""
    row = [0] * (len(other) + 1)
    for word in one:
        above = 0
        for j, wanted in enumerate(other, 1):
            above, row[j] = row[j], above + 1 if word == wanted else max(row[j], row[j - 1])
    return row[-1]
