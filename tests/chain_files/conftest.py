"""What read_chain makes of a text, or says against it."""

import re

import pytest
from latentmas.chain_files.reader import read_chain


@pytest.fixture
def file(tmp_path):
    return tmp_path / "chain.yaml"


@pytest.fixture
def read(file):
    """What read_chain makes of a text."""

    def read(text, **options):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_chain(file, **options)

    return read


@pytest.fixture
def faults(file, read):
    """The lines of the refusal of a text: (number, message) of each."""

    def faults(text):
        with pytest.raises(ValueError, match=re.escape(f"{file}:")) as error:
            read(text)
        lines = [line.removeprefix(f"{file}:").split(": ", 1) for line in str(error.value).splitlines()]
        return [(int(number), message) for number, message in lines]

    return faults
