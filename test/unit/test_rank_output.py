"""What the launcher says about ranks that failed."""

import pytest

from aligned_reid.rank_output import RankOutput, explain

MISTAKE = b"train.py: error: no such folder\n"


@pytest.fixture
def outputs(tmp_path):
    return [RankOutput(tmp_path / str(rank) / "log", on_console=rank == 0) for rank in range(2)]


def test_a_mistake_that_both_ranks_make_is_said_once(outputs, capfdbinary):
    for output in outputs:
        output.take(MISTAKE, is_error_stream=True)
    assert explain(outputs, 0, 1, 2) == explain(outputs, 0, 0, 2) == []
    assert capfdbinary.readouterr().err == MISTAKE


def test_what_only_the_failed_rank_said_is_said_for_it(outputs):
    outputs[0].take(b"a warning\n", is_error_stream=True)
    outputs[1].take(MISTAKE, is_error_stream=True)
    assert explain(outputs, 0, 1, 2) == [MISTAKE.decode().strip()]


def test_a_killed_rank_is_named_with_its_last_line(outputs):
    outputs[1].take(b"Ep 3\n", is_error_stream=False)
    (line,) = explain(outputs, 4, 1, -9)
    assert "rank 5 on " in line
    assert "was killed by signal 9" in line
    assert "its last line: Ep 3" in line
