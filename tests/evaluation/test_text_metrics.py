"""Rules for answers in words, each on a table of examples that were judged by hand."""

from types import SimpleNamespace

import pytest

from keeplora.evaluation.metrics import METRICS

TABLE = {
    "exact_match": [("The red car.", "red car", 1), ("red cars", "red car", 0), ("a", "a", 1), ("A", "an", 0),
                    ("5", "5.0", 0)],
    "contains": [("It is Red, I think", "red", 1), ("blue", "red", 0), ("hundred", "red", 1)],
    "choice_letter": [("B", "B", 1), ("(b) the dog", "B", 1), ("Answer: B.", "b", 1), ("the answer is C", "B", 0),
                      ("because", "B", 0), ("Beta", "B", 0), ("B. dog", "B. dog", 1)],
    "relaxed_accuracy": [("104", "100", 1), ("106", "100", 0), ("1,050", "1000", 1), ("50%", "0.5", 1),
                         ("Four", "4", 1),
                         ("Paris", "paris", 1), ("Paris", "100", 0), ("-95", "-100", 1), ("0.01", "0", 0)],
    "anls": [("hello", "hello", 1), ("helo", "hello", 0.8), ("xyz", "hello", 0), ("", "", 1)],
    "rouge_l": [("a red dog", "a red dog", 1), ("a dog", "a red dog", 0.8), ("dog a", "a dog", 0.5), ("no", "yes", 0),
                ("", "yes", 0)],
    "mllm_dcl_open": [("Unanswerable", "unanswerable", 0), ("a dog", "a", 1), ("an apple", "a", 1), ("bat", "a", 1),
                      ("it is at hand", "a", 1), ("yes, sir", "yes.", 1), ("in the red car", "red car", 1),
                      ("no it is", "n", 0),
                      ("go back.", "back", 1), ("yes", "yes", 1), ("yes", "no", 0)],
    "mllm_dcl_fin": [("B .", "b", 1), ("Yes.", "yes", 1), ("Yes it is", "yes", 0)],
    "equal_ignoring_case": [("Red", "rED", 1), ("red.", "red", 0)],
    "first_character": [("B. because", "B", 1), (" b", "B", 1), ("A", "B", 0), ("", "B", 0)],
    "edit_similarity": [("abcd", "abcd", 1), ("abd", "abcd", 6 / 7), ("x = <NUM_LIT:1>", "x =", 1), ("", "", 1),
                        ("ab", "cd", 0)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "p", "answer", "expected"), [(name, *row) for name, rows in TABLE.items() for row in rows]
)
def test_an_answer_is_judged_as_by_hand(name, p, answer, expected):
    reference = SimpleNamespace(answer=answer, question="", place="")
    assert METRICS[name]([p], [reference]) == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("p", "answer", "question", "place", "expected"),
    [
        ("B", "b", "", "images/AI2D_12.png", 1), ("B.", "b", "", "images/TQA_1.png", 0),
        ("b it is", "b", "", "VQA_3.png", 0),
        ("Ohio,Iowa", "Iowa,Utah", "Which states border it?", "images/map_1.png", 0.5),
        ("Ohio, Iowa", "Iowa,Utah", "Which states border it?", "images/map_1.png", 0),
        ("It is Iowa", "Iowa", "Which one?", "images/map_1.png", 1),
        ("it is iowa", "Iowa", "Which one?", "map_1.png", 0),
        ("Unanswerable Iowa", "Iowa", "Which one?", "map_1.png", 0),
    ],
)  # fmt: skip
def test_science_is_judged_by_the_set_of_the_image(p, answer, question, place, expected):
    reference = SimpleNamespace(answer=answer, question=question, place=place)
    assert METRICS["mllm_dcl_sci"]([p], [reference]) == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("p", "answer", "expected"),
    [
        # By hand. Of one word: keep a, b, right a (P 1/2, R 1, F 2/3); leave c, right; add x, right. Of two: "a b" is
        # kept, wanted none of the source's (P 0, R 1, F 0); "b c" left out, right; "b x" added, "a x" wanted, 0.
        # Of three and four words: 3: "a b c" left out, right, keep 1, add "a b x": 0 of 1, none to add: R 1, F 0.
        # Of four nothing is there: 1.
        ("a b x", "a x", ((2 / 3 + 1 + 1) / 3 + (0 + 1 + 0) / 3 + (1 + 1 + 0) / 3 + 1) / 4),
        ("a b c", "a b c", 1),
    ],
)
def test_sari_is_that_of_a_calculation_by_hand(p, answer, expected):
    reference = SimpleNamespace(answer=answer, question="a b c", place="")
    assert METRICS["sari"]([p], [reference]) == pytest.approx(100 * expected)


def test_a_score_is_the_mean_in_percent():
    references = [SimpleNamespace(answer=answer) for answer in ("red", "blue", "grey")]
    assert METRICS["exact_match"](["red", "blue", "no"], references) == pytest.approx(200 / 3)
