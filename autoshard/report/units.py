"""Numbers as people read them. The only place where a unit is chosen."""

from __future__ import annotations

import math

_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_COUNTS = (
    (1e24, "Y"),
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)


def bytes_text(bytes_: float) -> str:
    """Bytes with a binary unit.

    >>> bytes_text(85_899_345_920), bytes_text(1536), bytes_text(-12)
    ('80.0 GiB', '1.50 KiB', '-12 B')
    """
    for unit, name in _BYTES:
        if abs(bytes_) >= unit:
            return f"{_three(bytes_ / unit)} {name}"
    return f"{bytes_:.0f} B"


def seconds_text(time_s: float) -> str:
    """Seconds with the unit that leaves one to three digits before the point.

    >>> seconds_text(0.01234), seconds_text(5.6e-5), seconds_text(0.0)
    ('12.3 ms', '56.0 us', '0 s')
    """
    if time_s == 0:
        return "0 s"
    for unit, name in _SECONDS:
        # Compared as printed: 0.9999 ms is 1.00 ms, not 1000 us.
        if float(f"{abs(time_s) / unit:.3g}") >= 1:
            return f"{_three(time_s / unit)} {name}"
    return f"{time_s:.3g} s"


def count_text(count: float, unit: str = "") -> str:
    """A count with an SI prefix.

    >>> count_text(8_030_261_248), count_text(6.1e15, "FLOP"), count_text(950)
    ('8.03 G', '6.10 PFLOP', '950')
    """
    for factor, name in _COUNTS:
        if float(f"{abs(count):.3g}") >= factor:
            return f"{_three(count / factor)} {name}{unit}"
    return f"{count:.3g} {unit}".rstrip()


def params_text(params: int) -> str:
    """A number of parameters, in the billions and millions that papers use.

    >>> params_text(8_030_261_248), params_text(124_439_808), params_text(1_100)
    ('8.03 B', '124 M', '1100')
    """
    for factor, name in ((1e9, "B"), (1e6, "M")):
        if float(f"{params:.3g}") >= factor:
            return f"{_three(params / factor)} {name}"
    return str(params)


def percent_text(fraction: float) -> str:
    """A fraction as a percentage.

    >>> percent_text(0.456), percent_text(0.0001), percent_text(0)
    ('45.6 %', '0.01 %', '0.0 %')
    """
    small = 0 < abs(fraction) < 0.0005
    return f"{100 * fraction:.2f} %" if small else f"{100 * fraction:.1f} %"


def _three(number: float) -> str:
    """Three significant digits, without an exponent."""
    digits = math.floor(math.log10(abs(float(f"{number:.3g}")))) if number else 0
    return f"{number:.{max(0, 2 - digits)}f}"
