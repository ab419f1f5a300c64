"""How arguments may be typed."""

from collections.abc import Sequence

import click
import pytest

from mms_lite.arguments import expand_flags, spread_models

FLAGS = (
    "--start", "--stop", "--foreground", "--mms-config", "--model-store", "--models", "--log-config",
    "--log-location", "--metrics-address", "--metrics-location", "--start-timeout", "--version", "-h",
    "--help",
)  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--models", "a"], ["--models", "a"]),
        (["--models", "a.mar", "n=b.mar"], ["--models", "a.mar", "--models", "n=b.mar"]),
        (["--models", "a", "--models", "b"], ["--models", "a", "--models", "b"]),
        (["--models", "a", "b", "--models", "c"], ["--models", "a", "--models", "b", "--models", "c"]),
        (["--models=a"], ["--models=a"]),
        (["--models=a", "b"], ["--models=a", "--models", "b"]),
        (
            ["--models", "a", "b", "--model-store", "s", "--start"],
            ["--models", "a", "--models", "b", "--model-store", "s", "--start"],
        ),
        (["--start", "--models", "a"], ["--start", "--models", "a"]),
        (["--model-store", "s", "left over"], ["--model-store", "s", "left over"]),
        ([], []),
    ],
)
def test_several_models_after_one_flag(typed: Sequence[str], read: Sequence[str]) -> None:
    assert spread_models(typed) == read


@pytest.mark.parametrize(
    "typed", [["--models"], ["--models", "--start"], ["--models", "--models", "a"], ["--start", "--models"]]
)
def test_models_without_a_value_is_a_usage_error(typed: Sequence[str]) -> None:
    with pytest.raises(click.UsageError, match="requires an argument"):
        spread_models(typed)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--fore", "--foreground"),
        ("--f", "--foreground"),
        ("--sto", "--stop"),
        ("--star", "--start"),
        ("--start", "--start"),
        ("--start-", "--start-timeout"),
        ("--model-", "--model-store"),
        ("--models", "--models"),
        ("--mm", "--mms-config"),
        ("--log", "--log-config"),
        ("--l", "--log-config"),
        ("--log-l=x", "--log-location=x"),
        ("--metrics-a", "--metrics-address"),
        ("--h", "--help"),
        ("--v", "--version"),
        ("--mms=a=b", "--mms-config=a=b"),
        ("--bogus", "--bogus"),
        ("-h", "-h"),
        ("--", "--"),
        ("", ""),
        ("start", "start"),
        ("a=--fore", "a=--fore"),
    ],
)
def test_an_abbreviation_means_the_flag_of_mms_that_it_fits_or_else_ours(typed: str, read: str) -> None:
    assert expand_flags(["x", typed], FLAGS) == ["x", read]


@pytest.mark.parametrize(
    ("typed", "fitting"),
    [
        ("--s", "--start, --stop"),
        ("--st", "--start, --stop"),
        ("--mod", "--model-store, --models"),
        ("--model=x", "--model-store, --models"),
        ("--m", "--mms-config, --model-store, --models"),
        ("--metrics", "--metrics-address, --metrics-location"),
    ],
)
def test_an_abbreviation_of_several_flags_is_a_usage_error(typed: str, fitting: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        expand_flags([typed], FLAGS)
    assert caught.value.message == f"ambiguous option: {typed.partition('=')[0]} could match {fitting}"
