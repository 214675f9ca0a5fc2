"""Numbers keep their value through formatting; tables keep every cell."""

import pytest

from elastic_jax import tables


def test_counts_are_exact_with_separators():
    assert tables.format_count(241312) == "241,312"
    assert tables.format_count(31_577_940_288) == "31,577,940,288"


@pytest.mark.parametrize("power, unit", [(1, "KiB"), (2, "MiB"), (3, "GiB")])
@pytest.mark.parametrize("amount", [1, 2.5, 1023.9])
def test_bytes_use_the_largest_fitting_unit(power, unit, amount):
    text = tables.format_bytes(amount * 1024**power)
    assert text == f"{amount:,.1f} {unit}"


def test_bytes_never_show_a_full_unit_of_the_next():
    assert tables.format_bytes(1023) == "1,023 B"
    assert tables.format_bytes(1024**2 - 1) == "1.0 MiB"
    assert tables.format_bytes(2048 * 1024**3) == "2,048.0 GiB"


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (183.2, "3 min 03 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_seconds_roll_over(seconds, text):
    assert tables.format_seconds(seconds) == text


def test_nats_have_three_digits():
    texts = [tables.format_nats(x) for x in (0.034, 0.3, 1.9, 123.4)]
    assert texts == ["0.0340", "0.300", "1.90", "123"]


def test_bits_have_three_places():
    assert [tables.format_bits(x) for x in (2.10449, 0.0)] == ["2.104", "0.000"]


def test_nothing_measured_is_a_dash():
    forms = (
        tables.format_count, tables.format_bytes, tables.format_seconds,
        tables.format_share, tables.format_ratio, tables.format_nats,
        tables.format_bits,
    )
    assert {form(None) for form in forms} == {tables.NONE}
    assert tables.format_several([], tables.format_share) == tables.NONE


def test_several_values_show_their_range_one_does_not():
    assert tables.format_several([0.5], tables.format_share) == "50.0%"
    text = tables.format_several([0.5, 0.7], tables.format_share)
    assert text == "60.0% (50.0% to 70.0%)"


def test_a_table_keeps_every_cell_and_lines_up():
    rows = [{"a": "x|y", "b": 1}, {"a": None, "b": 1234567}]
    table = tables.markdown_table(
        rows, {"name": lambda r: r["a"], "n": lambda r: r["b"]}
    )
    heading, rule, first, second = table.split("\n")
    assert len({len(line) for line in (heading, rule, first, second)}) == 1
    assert "x\\|y" in first and "1234567" in second and tables.NONE in second
    assert rule.split("|")[1].strip().endswith("-")
    assert rule.split("|")[2].strip().endswith("-:")


def test_a_table_of_one_column_or_no_rows():
    assert tables.markdown_table([], {"a": str}) == "| a   |\n| --- |"
