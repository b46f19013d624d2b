"""Values of options: parsed, and written back to the same."""

import argparse

import pytest

from aligned_reid.flags import (
    OneLineParser,
    expand_home,
    expand_homes,
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


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (expand_home, "~/runs/a", "{home}/runs/a"),
        (expand_home, "~", "{home}"),
        (expand_home, "./~", "./~"),
        (expand_home, "runs/~/a", "runs/~/a"),
        (expand_home, "", ""),
        (expand_homes, "~/a+/b+~/c+d", "{home}/a+/b+{home}/c+d"),
    ],
)
def test_a_tilde_at_the_start_is_the_home_folder(monkeypatch, tmp_path, parse, text, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(text) == value.format(home=tmp_path)


def test_a_home_folder_that_does_not_exist_is_refused(monkeypatch, tmp_path):
    for home, path in ((tmp_path, "~nosuchuser/x"), (tmp_path / "none", "~/x")):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(argparse.ArgumentTypeError, match="no home folder"):
            expand_home(path)


def test_a_mistake_is_one_line_with_the_nearest_flag(capsys):
    parser = OneLineParser(prog="it", allow_abbrev=False)
    parser.add_argument("--workers")
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(["--worker=3"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "it: error: unknown flag --worker (did you mean --workers?); see it --help\n"
