import pytest

from autoshard.report.units import (
    bytes_text,
    count_text,
    params_text,
    percent_text,
    seconds_text,
)


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (80 * 2**30, "80.0 GiB"),
        (-3 * 2**20, "-3.00 MiB"),
        (512 * 2**30, "512 GiB"),
        (2 * 2**40, "2.00 TiB"),
    ],
)
def test_bytes(bytes_, text):
    assert bytes_text(bytes_) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0.0, "0 s"),
        (61.0, "61.0 s"),
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (4.2e-5, "42.0 us"),
        (7e-9, "7.00 ns"),
        (-0.002, "-2.00 ms"),
        # Rounding carries over the unit: never "1000 us".
        (0.00099999, "1.00 ms"),
        # A long step keeps its digits: never "1.23e+03 s".
        (1234.0, "1234 s"),
    ],
)
def test_seconds(time_s, text):
    assert seconds_text(time_s) == text


def test_counts_carry_over_the_prefix():
    assert count_text(999_999, "B/s") == "1.00 MB/s"
    assert count_text(999, "B/s") == "999 B/s"
    assert count_text(6.1e16, "FLOP") == "61.0 PFLOP"


def test_params_are_in_billions_and_millions():
    assert params_text(405_853_388_800) == "406 B"
    assert params_text(999_999_999) == "1.00 B"
    assert params_text(754_816) == "754816"


def test_a_small_percentage_is_not_shown_as_zero():
    assert percent_text(0.0004) == "0.04 %"
    assert percent_text(-0.25) == "-25.0 %"
    assert percent_text(0) == "0.0 %"
