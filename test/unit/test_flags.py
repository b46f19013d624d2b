"""Values of options: parsed, and written back to the same."""

import argparse

import pytest

from aligned_reid.flags import (
    OneLineParser,
    format_option,
    parse_bool,
    parse_height_width,
    parse_ints,
    parse_local_distance,
    parse_loss_scale,
    parse_margin,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bool, " True", True),
        (parse_bool, "false", False),
        (parse_ints, "(11, 21,)", (11, 21)),
        (parse_height_width, "[256,128]", (256, 128)),
        (parse_margin, "none", None),
        (parse_margin, "0.3", 0.3),
        (parse_loss_scale, "dynamic", None),
        (parse_loss_scale, "128", 128.0),
        (parse_local_distance, "auto", None),
        (parse_local_distance, "true", True),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == value
    if value is not None:
        assert parse(format_option(value)) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_bool, "yes"),
        (parse_ints, "1,a"),
        (parse_ints, "__import__('os')"),
        (parse_height_width, "256"),
        (parse_margin, "wide"),
        (parse_loss_scale, "0"),
        (parse_loss_scale, "inf"),
        (parse_local_distance, "perhaps"),
    ],
)
def test_what_is_no_value(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"neither|is not"):
        parse(text)


def test_a_mistake_is_one_line_with_the_nearest_flag(capsys):
    parser = OneLineParser(prog="it", allow_abbrev=False)
    parser.add_argument("--workers")
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--worker=3"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "it: error: unknown flag --worker (did you mean --workers?); see it --help\n"
