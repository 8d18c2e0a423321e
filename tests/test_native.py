"""C++ passes: when they are built, and which tensors they take."""

import shutil

import pytest
import torch

from adq_search.errors import AdqSearchWarning, QuantizerError
from adq_search.native import NativeLibrary
from adq_search.norms import _passes
from adq_search.quantizers import _native
from adq_search.stacking import _native as _slots

LIBRARIES = {
    "quantizers": _native.LIBRARY,
    "norms": _passes.LIBRARY,
    "stacking": _slots.LIBRARY,
}
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch, tmp_path):
    """As a process has it that finds nothing on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = LIBRARIES[request.param]
    return NativeLibrary(known.source, known.signatures, headers=known.headers[1:])


@pytest.mark.parametrize(("mode", "is_error"), [("auto", False), ("native", True)])
def test_no_compiler_is_no_error_unless_native_is_asked_for(library, mode, is_error, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", mode)
    if is_error:
        with pytest.raises(QuantizerError, match="no-such-compiler"):
            library.takes(torch.zeros(3))
    else:
        with pytest.warns(AdqSearchWarning, match="Install a C\\+\\+ compiler"):
            assert not library.takes(torch.zeros(3))


def test_an_unknown_mode_is_refused(library, monkeypatch):
    monkeypatch.setenv("ADQ_SEARCH_COMPILE", "fast")
    with pytest.raises(QuantizerError, match="auto, native, inductor, off, not 'fast'"):
        library.takes(torch.zeros(3))


@needs_compiler
def test_a_library_is_built_once_and_found_again(library):
    built = library.build()
    made_at = built.stat().st_mtime_ns
    assert library.build() == built
    assert built.stat().st_mtime_ns == made_at
    assert [file.name for file in built.parent.iterdir()] == [built.name]
    assert library.takes(torch.zeros(3))


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(2, 3, device="meta"),
    ],
    ids=["float64", "no values", "with gaps", "no memory"],
)
def test_what_is_left_to_tensor_operations(values):
    assert not _native.takes(values)
