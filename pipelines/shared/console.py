"""Print lines of progress, and write durations for readers."""

from __future__ import annotations


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
