"""Which kernels a device may run."""

from interpreter import assert_passes


def test_the_first_use_of_a_kernel_in_the_interpreter(tmp_path):
    assert_passes("interpreted_trust.py", tmp_path)
