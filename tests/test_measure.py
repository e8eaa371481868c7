import pytest

from keeplora import measure


@pytest.mark.parametrize("status", [None, "Name:\tpython\n"], ids=["no file", "no line"])
def test_peak_memory_is_known_where_the_kernel_does_not_tell_it(tmp_path, monkeypatch, status):
    path = tmp_path / "status"
    if status:
        path.write_text(status)
    monkeypatch.setattr(measure, "STATUS", path)
    phases = {}
    with measure.measured(phases, "train"):
        pass
    assert phases["train"]["peak_memory_mb"] > 1
