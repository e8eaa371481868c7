"""Times and bytes are sums that one can check by hand."""

import pytest

from keeplora.studies.doctor.resource_estimate import Load, Pace, Paces, estimate_disk, estimate_seconds, pace_of

PACES = Paces(gradient=Pace(1.0, 0.5), train=Pace(0.5, 2.0), merge=Pace(3.0, 0.25), evaluate=Pace(0.25, 0.125))
FIRST = Load("first", classes=10, images=100, batches=10, held_out_batches=4, epochs=3)


def test_a_batch_takes_the_median_without_the_first_and_what_the_first_takes_more_counts_once():
    pace = pace_of(20.0, [[5.0, 2.0, 3.0, 2.0]])
    assert pace == Pace(fixed=8.0 + 3.0, per_batch=2.0)


def test_several_passes_add_up_to_one_pace():
    assert pace_of(10.0, [[1.0, 1.0], [], [2.0, 2.0]]) == Pace(fixed=4.0, per_batch=3.0)


def test_a_batch_that_is_alone_is_the_pace():
    assert pace_of(3.0, [[2.0]]) == Pace(fixed=1.0, per_batch=2.0)


def test_a_phase_without_batches_is_all_fixed():
    assert pace_of(3.0, []) == Pace(fixed=3.0, per_batch=0.0)


def test_known_paces_give_the_hand_computed_seconds():
    second = Load("second", classes=20, images=50, batches=5, held_out_batches=2, epochs=1)
    paces = {"first": PACES, "second": Paces(train=Pace(0.0, 4.0), evaluate=Pace(1.0, 0.0))}
    found = estimate_seconds([FIRST, second], paces, start=7.0, per_image=0.01)
    assert found == pytest.approx(
        {
            "read": 1.5,
            "start": 7.0,
            "gradient": 1 + 10 * 0.5,
            "train": 3 * (0.5 + 10 * 2.0) + 5 * 4.0,
            "merge": 3 + 10 * 0.25,
            "evaluate": 3 * (0.25 + 4 * 0.125) + 3 * 1.0,  # before the first task, and after each of two
        }
    )


def test_a_share_of_the_batches_shortens_the_gradient_alone():
    whole = estimate_seconds([FIRST], {"first": PACES})
    share = estimate_seconds([FIRST], {"first": PACES}, gradient_share=0.25)
    assert share["gradient"] == pytest.approx(1 + 3 * 0.5)
    assert share | {"gradient": 0.0} == whole | {"gradient": 0.0}


def test_a_model_that_never_changes_is_evaluated_once():
    found = estimate_seconds([FIRST], {"first": PACES}, evaluations=1)
    assert found["evaluate"] == pytest.approx(0.75)


def test_a_task_that_was_not_tried_lies_between_its_neighbours_in_number_of_classes():
    loads = [Load(name, classes, 0, 1, 0, 1) for name, classes in (("few", 10), ("some", 20), ("many", 50))]
    paces = {"few": Paces(train=Pace(0, 1.0)), "many": Paces(train=Pace(0, 5.0))}
    assert estimate_seconds(loads, paces)["train"] == pytest.approx(1 + 2 + 5)


def test_the_bytes_on_disk_are_those_of_the_shapes():
    found = estimate_disk(
        {"one": (7, 5), "other": (3, 11)}, {"one": 2, "other": 10}, rank=2, num_tasks=4, model_bytes=1000, other=6
    )
    assert found == {
        "merged model, twice": 2000,
        "adapters": 4 * 4 * 2 * (7 + 5 + 3 + 11),
        "directions, at most": 4 * (2 * 5 + 10 * 11),
        "gradients between phases": 4 * (35 + 33),
        "other": 24,
    }


def test_what_a_run_does_not_keep_is_left_out():
    found = estimate_disk({"one": (7, 5)}, {}, rank=2, num_tasks=1, model_bytes=0, other=0)
    assert found == {"adapters": 4 * 2 * (7 + 5), "gradients between phases": 4 * 35}
