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


@pytest.mark.slow
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


@needs_compiler
@pytest.mark.parametrize("n", [1, 3, 7, 8, 15, 16, 31, 32, 63, 100, 127, 128, 255])
@pytest.mark.parametrize("spread", ["even", "uneven", "some equal"])
def test_cuts_below_a_value_are_counted_exactly(n, spread):
    """Against a comparison with each, at the cuts themselves and one ulp around them."""
    torch.manual_seed(n)
    widths = torch.full((n,), 2.0 / n)
    if spread == "uneven":
        widths = torch.where(torch.rand(n) < 0.5, 1e-3, 5.0) * (0.5 + torch.rand(n))
    if spread == "some equal":
        widths = widths * (torch.rand(n) < 0.5)
    cuts = widths.cumsum(0) - 0.7
    up, down = (cuts.nextafter(torch.tensor(v)) for v in (torch.inf, -torch.inf))
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan])
    values = torch.cat([cuts, up, down, 6 * torch.randn(500), special])
    one, zero = torch.ones(()), torch.zeros(())
    out, index = torch.empty_like(values), torch.empty_like(values, dtype=torch.uint8)
    arguments = (one, cuts, n, one, zero, out, index, len(values), 1)
    _native.LIBRARY.call("thresholds", values, *arguments)
    wanted = (values.unsqueeze(1) > cuts).sum(dim=1)
    assert torch.equal(index.long(), wanted)
    assert torch.equal(out[:-1], wanted[:-1].float())
    assert out[-1].isnan()
