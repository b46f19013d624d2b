"""What the launcher says about ranks that failed."""

import signal

import pytest

from aligned_reid.rank_output import RankOutput, explain, first_failure

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


@pytest.mark.parametrize("exit_code", [2, -signal.SIGTERM])
def test_a_mistake_is_the_cause_though_a_lost_connection_was_seen_first(outputs, exit_code):
    """The agent may stop the rank while it is on its way out."""
    outputs[0].take(b"RuntimeError: Connection closed by peer\n", is_error_stream=True)
    outputs[1].take(MISTAKE, is_error_stream=True)
    assert first_failure({0: 1, 1: exit_code}, outputs) == (1, 2)


def test_a_rank_that_the_agent_stopped_is_not_the_cause(outputs):
    outputs[1].take(b"train.py: interrupted\n", is_error_stream=True)
    outputs[0].take(b"RuntimeError: out of memory\n", is_error_stream=True)
    assert first_failure({0: 1, 1: -signal.SIGTERM}, outputs) == (0, 1)
