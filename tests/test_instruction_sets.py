"""The C++ passes agree with tensor operations on processors that have other instructions.

Each case builds them anew, with a compiler that is told to leave instructions out, or to take
AVX-512's from a header that computes them one value at a time, and runs tests of all passes in a
process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = {
    "AVX-512": f"-Wno-psabi -include {HERE / 'avx512_by_value.hpp'}",
    "AVX2": "-mno-avx512f",
    "neither": "-mno-avx512f -mno-avx2",
}
TESTS = [
    "tests/test_native.py::test_cuts_below_a_value_are_counted_exactly",
    "tests/test_norms.py",
    "tests/test_stacking_slots.py",
    "tests/test_kernels.py::test_every_form_is_equal_to_plain_tensor_operations",
]


def macros(compiler, *flags):
    asked = [compiler, "-march=native", *flags, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_passes_for_other_processors_are_right(name, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    own = macros(compiler)
    if name == "AVX-512" and ("__AVX512F__" in own or "__AVX2__" not in own):
        pytest.skip("the processor's own are tested, or there is no AVX2 to write them in")
    flags = FLAGS[name]
    if name != "AVX-512" and macros(compiler, *flags.split()) == own:
        pytest.skip("this processor has no more than that")
    script = tmp_path / "compiler"
    # What is built against torch has no such flag of the processor's.
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-march=native*) exec {compiler} "$@" {flags};; esac\n'
        f'exec {compiler} "$@"\n'
    )
    script.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(script),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "ADQ_SEARCH_COMPILE": "native",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *TESTS],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert list((tmp_path / "cache").rglob("kernels-*.so"))
