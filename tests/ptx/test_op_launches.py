"""Every launch of the ops compiles with this version of Triton, over the sizes of their tests and all dtypes."""

import pytest
from ops.test_op_launches import assert_compile


@pytest.mark.parametrize("capability", [90, 80])
def test_every_size_of_the_tests_compiles(capability):
    assert_compile(capability, "float32", "float16", "bfloat16")
