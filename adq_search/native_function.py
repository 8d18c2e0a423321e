"""Differentiable functions whose passes are C++, written down as names.

A function says what its forward and its backward pass call on what. `native_function.cpp` reads
that once and puts a node into torch's graph that needs no Python afterwards: a node in Python takes
about as long as the passes over a small layer. Where those nodes cannot be built, `_Interpreted`
does the same, more slowly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adq_search.native import HEADER, NativeLibrary, build, laid_out_as, loaded

# torch leaves Function.apply and its operators without annotations.
# mypy: disable-error-code="no-untyped-call"

#: In the place of an argument: a null pointer, or 0.
NONE: Final = "none"
_LIKE, _BYTES, _FLOATS = range(3)
_TENSOR, _NUMBER, _FIGURE, _IS_HALF = range(4)
_KINDS = {"p": _TENSOR, "l": _NUMBER, "f": _FIGURE}


class NativeFunction:
    """A function of tensors with a forward and a backward pass in C++.

    Passes are calls, each a line of names: the function, the values whose type it works on, then
    its other arguments. A name is that of an input, a number, a tensor in `rooms`; `upstream_X`
    is the gradient of the loss at the output X, laid out as X, and `grad_X` the gradient to the
    input X, which the backward pass writes. `none` is no tensor, or 0.

    Args:
        *libraries: Hold the functions; of two of one name, the first one's is called.
        inputs: Names of the tensors that come in.
        numbers: Names of the numbers that come in.
        rooms: Tensors that the passes write: `like X`, `bytes like X`, or `floats N M` for float32,
            # shape: (N, M), with names of numbers. What they are like in the backward pass is kept
            for it. Gradients to inputs are like those, if not said otherwise.
        outputs: Names of those returned. Only through those whose gradient is used does one flow.
        forward: Its calls.
        backward: Its calls.
        passed: Inputs whose gradient is that of an output, as it comes.
    """

    def __init__(
        self,
        *libraries: NativeLibrary,
        inputs: str,
        numbers: str,
        rooms: Mapping[str, str],
        outputs: str,
        forward: Sequence[str],
        backward: Sequence[str] = (),
        passed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._libraries = libraries
        self._inputs = inputs.split()
        self._numbers = {name: i for i, name in enumerate(numbers.split())}
        self.outputs = outputs.split()
        self.forward = [call.split() for call in forward]
        self.backward = [call.split() for call in backward]
        grads = {f"grad_{name}": f"like {name}" for name in self._inputs}
        self._rooms = {name: room.split() for name, room in {**grads, **rooms}.items()}
        written = {name for call in self.forward for name in call}
        needed = {name for call in self.backward for name in call}
        #: Names of the tensors that each pass makes.
        self.made = [name for name in self._rooms if name in written]
        self.found = [name for name in self._rooms if name in needed - written]
        upstream = [f"upstream_{name}" for name in self.outputs]
        names = [*self._inputs, *self.made, *upstream, *self.found]
        #: Places of the tensors: inputs, what the forward pass makes, gradients of the outputs,
        #: what the backward pass makes.
        self.tensors = {name: i for i, name in enumerate(names)}
        #: What each gradient of an output is laid out as: the output, or what it was made like.
        layouts = [
            None if f"upstream_{name}" not in needed else name if name in needed else of[-1]
            for name, of in ((name, self._rooms[name]) for name in self.outputs)
        ]
        kept = {*needed, *layouts, *(self._rooms[name][-1] for name in self.found)}
        n_forward = len(self._inputs) + len(self.made)
        self.n_forward = n_forward
        self.kept = [i for i, name in enumerate(names[:n_forward]) if name in kept]
        self.layouts = [-1 if name is None else self.tensors[name] for name in layouts]
        passing = {f"grad_{name}": f"upstream_{output}" for name, output in passed.items()}
        flowing = needed | set(passing.values())
        self.is_differentiable = [int(name in flowing) for name in upstream]
        self.gradients = [self.tensors.get(passing.get(name, name), -1) for name in grads]

    def __call__(self, inputs: Sequence[Tensor | None], numbers: Sequence[float]) -> list[Tensor]:
        """Return the outputs.

        Args:
            inputs: In the order of their names; None for those that are not there.
            numbers: Likewise.
        """
        if GRAPH.is_there:
            found: list[Tensor] = torch.ops.adq_search.apply(self._program, inputs, numbers)
            return found
        return list(_Interpreted.apply(self, numbers, *inputs))

    @cached_property
    def _program(self) -> int:
        """Where `native_function.cpp` keeps it, read from integers."""
        outputs = [self.tensors[name] for name in self.outputs]
        lists: list[list[int]] = [
            outputs,
            self.is_differentiable,
            self.layouts,
            self.kept,
            self.gradients,
        ]
        code = [*self._code(self.made, self.forward), *self._code(self.found, self.backward)]
        for own in lists:
            code += [len(own), *own]
        return int(torch.ops.adq_search.define(code))

    def _code(self, made: Sequence[str], calls: Sequence[Sequence[str]]) -> list[int]:
        code = [len(made)]
        for name in made:
            kind, of = self.room(name)
            code += [kind, len(of), *of]
        code.append(len(calls))
        for name, *rest in calls:
            arguments = self.arguments(name, rest)
            code += [self.library(name).address(name), len(arguments)]
            code += [number for argument in arguments for number in argument]
        return code

    def room(self, name: str) -> tuple[int, list[int]]:
        """Return what is allocated for a name: its kind, and the tensor or numbers it follows."""
        kind, *of = self._rooms[name]
        if kind == "floats":
            return _FLOATS, [self._numbers[size] for size in of]
        return (_BYTES if kind == "bytes" else _LIKE), [self.tensors[of[-1]]]

    def library(self, function: str) -> NativeLibrary:
        """Return the library that holds a function."""
        return next(library for library in self._libraries if function in library.signatures)

    def arguments(self, function: str, names: Sequence[str]) -> list[tuple[int, int]]:
        """Return kind and place of each argument, the type of the values first; -1 for none."""
        letters = self.library(function).signatures[function][1:]
        found = [(_IS_HALF, self.tensors[names[0]])]
        for letter, name in zip(letters, names, strict=True):
            known: Mapping[str, int] = self.tensors if letter == "p" else self._numbers
            found.append((_KINDS[letter], -1 if name == NONE else known[name]))
        return found


class _Graph:
    """The operators of `native_function.cpp`."""

    source = Path(__file__).with_suffix(".cpp")

    @cached_property
    def is_there(self) -> bool:
        """Whether they could be built and loaded."""
        return loaded(self._load) is not None

    def _load(self) -> Path:
        built = build(self.source, [HEADER], self.flags())
        torch.ops.load_library(built)
        return built

    @staticmethod
    def flags() -> list[str]:
        """Return what the compiler is told."""
        home = Path(torch.__file__).parent
        includes = [home / "include", home / "include/torch/csrc/api/include"]
        return [
            *("-std=c++20", "-O1", "-shared", "-fPIC"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f'-DTORCH_VERSION="{torch.__version__}"',
            *(f"-I{folder}" for folder in includes),
            *(f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"),
        ]


GRAPH: Final = _Graph()


class _Interpreted(Function):
    """A `NativeFunction` whose node is Python's."""

    @staticmethod
    def forward(
        ctx: Any, function: NativeFunction, numbers: Sequence[float], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        tensors: list[Any] = [*inputs]
        _run(function, function.made, function.forward, tensors, numbers)
        out = [tensors[function.tensors[name]] for name in function.outputs]
        own = zip(out, function.is_differentiable, strict=True)
        ctx.mark_non_differentiable(*(one for one, is_one in own if not is_one))
        ctx.save_for_backward(*(tensors[i] for i in function.kept))
        ctx.function, ctx.numbers = function, numbers
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        function: NativeFunction = ctx.function
        tensors: list[Any] = [None] * function.n_forward
        for i, tensor in zip(function.kept, ctx.saved_tensors, strict=True):
            tensors[i] = tensor
        for gradient, layout in zip(upstream, function.layouts, strict=True):
            tensors.append(gradient if layout < 0 else laid_out_as(gradient, tensors[layout]))
        _run(function, function.found, function.backward, tensors, ctx.numbers)
        return None, None, *(None if i < 0 else tensors[i] for i in function.gradients)


def _run(
    function: NativeFunction,
    made: Sequence[str],
    calls: Sequence[Sequence[str]],
    tensors: list[Any],
    numbers: Sequence[float],
) -> None:
    for name in made:
        kind, of = function.room(name)
        if kind == _FLOATS:
            tensors.append(torch.empty([int(numbers[i]) for i in of]))
            continue
        like, dtype = tensors[of[0]], torch.uint8 if kind == _BYTES else None
        tensors.append(None if like is None else torch.empty_like(like, dtype=dtype))
    for name, values, *rest in calls:
        given: list[Any] = []
        for kind, i in function.arguments(name, [values, *rest])[2:]:
            if kind == _TENSOR:
                given.append(None if i < 0 else tensors[i])
            else:
                number = 0 if i < 0 else numbers[i]
                given.append(int(number) if kind == _NUMBER else float(number))
        function.library(name).call(name, tensors[function.tensors[values]], *given)
