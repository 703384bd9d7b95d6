"""Lists of what is wrong, short enough to be read."""

from collections.abc import Sequence


def shortened(faults: Sequence[str], most: int, more: str = "more") -> list[str]:
    """The first ones, and behind them how many there are beside these."""
    left = len(faults) - most
    return [*faults[:most], *([f"and {left:,} {more}"] if left > 0 else [])]
