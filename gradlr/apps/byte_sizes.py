"""Sizes of memory, as commands take them; `gradlr.report.summary.format_bytes` writes them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_COUNTS = {unit.lower(): count for unit, count in _UNITS.items()}


def parse_bytes(text: str) -> int:
    """A size with its unit, in any case, as bytes: "24GiB" as 25769803776. A `type=` for argparse.

    Raises:
        argparse.ArgumentTypeError: it is no positive number with a unit; a number alone could be meant in any.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].lower() not in _COUNTS or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a size such as 8GiB, a number with one of {', '.join(_UNITS)}")
    return int(float(found[1]) * _COUNTS[found[2].lower()])
