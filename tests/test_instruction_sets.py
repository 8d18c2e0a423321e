"""The C++ passes agree with tensor operations on processors that have less than this one.

Each case builds them anew, with a compiler that is told to leave instructions out, and runs tests
of all passes in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = {"AVX2": "-mno-avx512f", "neither AVX-512 nor AVX2": "-mno-avx512f -mno-avx2"}
TESTS = [
    "tests/test_native.py",
    "tests/test_norms.py",
    "tests/test_stacking_slots.py",
    "tests/test_kernels.py::test_every_form_is_equal_to_plain_tensor_operations",
]


def macros(compiler, *flags):
    asked = [compiler, "-march=native", *flags, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_passes_for_lesser_processors_are_right(flags, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    if macros(compiler) == macros(compiler, *flags.split()):
        pytest.skip("this processor has no more than that")
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" {flags}\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(script),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "ADQ_SEARCH_COMPILE": "native",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert list((tmp_path / "cache").rglob("kernels-*.so"))
