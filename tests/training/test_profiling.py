import pytest

from keeplora.training import profiling


@pytest.mark.parametrize("status", [None, "Name:\tpython\n"], ids=["no file", "no line"])
def test_peak_memory_is_known_where_the_kernel_does_not_tell_it(tmp_path, monkeypatch, status):
    path = tmp_path / "status"
    if status:
        path.write_text(status)
    monkeypatch.setattr(profiling, "STATUS", path)
    clock = profiling.Clock()
    with clock.phase("train"):
        pass
    assert clock.read()["train"]["peak_memory_mb"] > 1


def test_time_inside_an_inner_phase_counts_for_that_one_alone_and_attempts_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    clock = profiling.Clock({"gradient": {"seconds": 100.0, "peak_memory_mb": 1e9}})
    with clock.phase("initialise"):
        now[0] += 1
        with clock.phase("gradient"):
            now[0] += 10
            assert clock.read()["gradient"]["seconds"] == 110
        now[0] += 2
    now[0] += 1000
    found = clock.read()
    assert {name: phase["seconds"] for name, phase in found.items()} == {"initialise": 3, "gradient": 110}
    assert found["gradient"]["peak_memory_mb"] == 1e9


def test_a_phase_that_fails_does_not_stay_open(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    clock = profiling.Clock()
    with clock.phase("outer"):
        with pytest.raises(KeyError), clock.phase("inner"):
            raise KeyError
        now[0] += 5
    assert clock.read()["outer"]["seconds"] == 5


def test_a_counter_that_may_not_be_reset_ends_no_run(monkeypatch, tmp_path):
    closed = tmp_path / "folder"
    closed.mkdir()
    monkeypatch.setattr(profiling, "CLEAR", closed)  # There, and not to be written to.
    clock = profiling.Clock()
    with clock.phase("one"):
        pass
    assert clock.read()["one"]["peak_memory_mb"] > 0
