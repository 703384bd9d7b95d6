"""Cut long lists of error messages."""

from collections.abc import Sequence


def shortened(faults: Sequence[str], most: int, more: str = "more") -> list[str]:
    """Return the first `most` faults; where there are others, "and 12 more" follows, with `more` as the last words."""
    left = len(faults) - most
    return [*faults[:most], *([f"and {left:,} {more}"] if left > 0 else [])]
