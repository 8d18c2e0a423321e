"""Passes over memory in C++, for CPU tensors: built when first needed, tensor operations otherwise.

A library is built with the machine's C++ compiler, which takes seconds, and kept on disk
(`$XDG_CACHE_HOME/adq_search`, by default `~/.cache/adq_search`) for every later process.
`ADQ_SEARCH_COMPILE` says which form of the arithmetic runs:

`auto`      C++ on CPUs, `torch.compile` on other devices; tensor operations where there is no
            compiler
`native`    the same, and an error where the C++ cannot be built
`inductor`  `torch.compile` on CPUs too
`off`       tensor operations everywhere
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from adq_search.errors import AdqSearchWarning, QuantizerError

MODES = ("auto", "native", "inductor", "off")
HEADER = Path(__file__).with_name("native.hpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Contraction of products and sums would change last bits.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Compilers take half of the registers' width otherwise.
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
Loaded = TypeVar("Loaded")
_WITH_MEMORY = (Tensor, nn.Parameter)
_TYPES_OF_VALUES = (torch.float32, torch.bfloat16)
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}


def compile_mode() -> str:
    """Return what `ADQ_SEARCH_COMPILE` says, `auto` by default.

    Raises:
        QuantizerError: It says something else.
    """
    mode = os.environ.get("ADQ_SEARCH_COMPILE", "auto")
    if mode not in MODES:
        msg = f"ADQ_SEARCH_COMPILE is one of {', '.join(MODES)}, not {mode!r}. Correct it."
        raise QuantizerError(msg)
    return mode


class NativeLibrary:
    """The C++ functions of one source file.

    Args:
        source: Includes `native.hpp`. Each function's first arguments are whether the values are
            bfloat16, and where they lie.
        signatures: Arguments by function: p pointer, l long, f float.
        headers: What the source includes besides.
    """

    def __init__(
        self, source: Path, signatures: Mapping[str, str], *, headers: Sequence[Path] = ()
    ) -> None:
        self.source = source
        self.signatures = signatures
        self.headers = (HEADER, *headers)

    def takes(self, values: Tensor, *parameters: Tensor) -> bool:
        """Return whether the functions work on these tensors, here and now.

        Args:
            values: Of any shape, in rows that lie one after the other in memory.
            parameters: Whatever else is pointed at: float32, without gaps.
        """
        return (
            # Tensors of other classes (fake, batched, distributed) have no memory to point at.
            type(values) in _WITH_MEMORY
            and values.is_cpu
            and values.dtype in _TYPES_OF_VALUES
            and all(map(is_plain, parameters))
            and layout_of(values) is not None
            and values.numel() > 0
            and compile_mode() in ("auto", "native")
            and not torch.compiler.is_compiling()
            and self._library is not None
        )

    def call(self, name: str, values: Tensor, *arguments: Tensor | float | None) -> None:
        """Call a function; tensors are passed as the place where they lie, None as no place."""
        function = getattr(self._library, name)
        half = values.dtype == torch.bfloat16
        function(half, values.data_ptr(), *[_plain(argument) for argument in arguments])

    def address(self, name: str) -> int:
        """Return where a function is that `CALLED_BY_GRAPH` of `native.hpp` made."""
        function = getattr(self._library, f"{name}_by_words")
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    @cached_property
    def _library(self) -> ctypes.CDLL | None:
        """The library, built where that is needed; None, after a warning, where that fails.

        Raises:
            QuantizerError: It fails, and `ADQ_SEARCH_COMPILE=native` asks for it.
        """
        library = loaded(lambda: ctypes.CDLL(str(self.build())))
        if library is None:
            return None
        for name, signature in self.signatures.items():
            function = getattr(library, name)
            function.argtypes = [_TYPES[letter] for letter in signature]
            function.restype = None
        return library

    def build(self) -> Path:
        """Return the library of this source, compiler and processor; build it if there is none."""
        return build(self.source, self.headers, FLAGS)


def loaded(load: Callable[[], Loaded]) -> Loaded | None:
    """Return what a library's building and loading returns; None, after a warning, where it fails.

    Raises:
        QuantizerError: It fails, and `ADQ_SEARCH_COMPILE=native` asks for it.
    """
    try:
        return load()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip().splitlines()[:1]
        msg = (
            f"The C++ passes of training cannot be built ({type(error).__name__}: {detail}), "
            "so quantized training is slower. Install a C++ compiler with OpenMP (or name one "
            "in CXX), or set ADQ_SEARCH_COMPILE=off to hide this."
        )
        if compile_mode() == "native":
            raise QuantizerError(msg) from error
        warnings.warn(msg, AdqSearchWarning, stacklevel=2)
        return None


def build(source: Path, headers: Sequence[Path], flags: Sequence[str]) -> Path:
    """Return the library of a source, for this compiler and processor; build it if there is none.

    Args:
        source: In C++.
        headers: What it includes of ours.
        flags: Of the compiler; those that begin with `-l` or `-L` stand behind the source.
    """
    compiler = os.environ.get("CXX", "c++")
    links = [flag for flag in flags if flag.startswith(("-l", "-L"))]
    own = [flag for flag in flags if flag not in links]
    asked = [compiler, *own, *(f"-I{folder}" for folder in sorted({h.parent for h in headers}))]
    # The macros tell the compiler's version and what -march=native stands for here.
    macros = subprocess.run(
        [*asked, "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    )
    written = [file.read_text() for file in (source, *headers)]
    content = [*written, compiler, *flags, macros.stdout]
    key = hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    built = Path(home) / "adq_search" / f"{source.stem}-{key}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            draft = Path(folder) / built.name
            subprocess.run(
                [*asked, "-o", str(draft), str(source), *links],
                capture_output=True,
                text=True,
                check=True,
            )
            draft.replace(built)
    return built


def layout_of(tensor: Tensor) -> torch.memory_format | None:
    """Return a format in which the tensor lies in memory without gaps, first dimension first."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the type and the places in memory of another of its shape."""
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    layout = layout_of(like) or torch.contiguous_format
    return tensor.to(like.dtype).contiguous(memory_format=layout)


def _plain(argument: Tensor | float | None) -> float | None:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def is_plain(parameter: Tensor) -> bool:
    """Return whether it is a float32 tensor on the CPU without gaps."""
    return parameter.is_cpu and parameter.dtype == torch.float32 and parameter.is_contiguous()
