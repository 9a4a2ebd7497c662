"""A number → as a person reads it, and as JSON holds it."""

import math

_DIGITS = 4
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> float | int | None:
    """A number as JSON can hold it, to four digits; None for NaN and infinity."""
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.{_DIGITS}g}")


def figure(value: float) -> str:
    """A number as a person reads it.  0.0005 -> 5 × 10⁻⁴; 0.99784 -> 0.9978; 2312 -> 2,312; NaN -> none"""
    value = float(value)
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "infinity"
    if value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if 0.001 <= abs(value) < 1000:
        return f"{value:.4g}" if abs(value) > 0.9 else f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    power = power_of_ten(int(exponent))
    return power if digits == "1.0" else f"{digits.removesuffix('.0')} × {power}"


def power_of_ten(exponent: int) -> str:
    """-3 -> 10⁻³"""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)
