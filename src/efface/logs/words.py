"""Numbers in words."""

from __future__ import annotations


def many(count: int, thing: str) -> str:
    """A number of things.

    >>> many(1, "step"), many(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes as people read them.

    >>> size(999), size(2**20 * 1.5)
    ('999 B', '1.50 MiB')
    """
    unit = 0
    while count >= 1000 and unit < 4:
        count, unit = count / 1024, unit + 1
    digits = 0 if unit == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def seconds(count: float) -> str:
    """A duration as people read it.

    >>> seconds(4.2), seconds(600), seconds(9000)
    ('4 s', '10 min', '2.5 h')
    """
    if count < 120:
        return f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"
