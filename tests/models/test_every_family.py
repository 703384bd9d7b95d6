"""Every causal LM of the installed transformers: accelerated, the same as plain, or left to it as docs/models.md says.

Random models write the same few tokens, so that logits and latents are compared as well.
"""

import pytest
import transformers
from every_family import FAMILIES, made_with, row_of, table
from tiny_families import SKIPPED, tiny

TABLE = table()


def built(family):
    try:
        return None if family in SKIPPED else tiny(family)
    except Exception as error:
        if transformers.__version__ == made_with():
            raise
        pytest.skip(f"this version of transformers does not build a tiny {family}: {error}")


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.filterwarnings("ignore")
def test_same_as_transformers_or_left_to_it(family):
    """row_of() holds generate(), latent steps and text behind them against plain loops; errors of other kinds go through."""
    row, documented = row_of(family, built(family)), TABLE.get(family)
    if documented is None:
        pytest.skip(f"{family} is newer than the table of docs/models.md: {row}")
    if transformers.__version__ == made_with():
        assert row == documented, "write the table of docs/models.md anew: python tests/models/every_family.py"
    else:  # versions give other reasons for the same
        assert (row.generate, row.latent) == (documented.generate, documented.latent)


def test_the_table_is_whole_and_of_nothing_else():
    if transformers.__version__ != made_with():
        pytest.skip("the table is of another version of transformers")
    assert sorted(TABLE) == sorted(FAMILIES)


def test_what_is_skipped_has_a_reason_and_is_little():
    assert all(SKIPPED.values())
    assert len(SKIPPED) < 10
