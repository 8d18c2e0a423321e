"""Freed memory is kept, unless somebody chose otherwise."""

import ctypes
import os
import subprocess
import sys

import pytest

from adq_search.own_process import keep_freed_memory

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library"
)
SCRIPT = """
import resource, sys, torch
from adq_search.own_process import set_up_process
if sys.argv[1] == "kept":
    set_up_process(1)
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, beyond what glibc ever keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
@needs_glibc
def test_freed_memory_is_not_faulted_in_again():
    assert page_faults("kept") < page_faults("given back") / 10


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_TOP_PAD_", "GLIBC_TUNABLES"])
def test_who_chose_an_allocators_settings_keeps_them(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert not keep_freed_memory()
