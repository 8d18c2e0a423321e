r"""From a trained fake-quantized network to the same network in integers.

Notation:
    v_j        sums of bank j of a layer, one integer a code times a word
    r_jo       what one of them is worth at output o
    g, h       batch norm in evaluation as y g + h, with g = gamma / sqrt(var + eps)
    unit       value of one between layers, a power of two; 32 bits hold every value that can occur

A batch norm and a ReLU behind a layer are folded into its requantization; where the next thing is
the input quantizer of one uniform layer, the requantization makes that layer's codes at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, fx, nn

from adq_search.convert import quantized_layers
from adq_search.errors import IntegerError
from adq_search.integer._affine import NO_LIMIT, Affine, folded
from adq_search.integer._exact import ExactSum, Geometry
from adq_search.integer._fixed import Carrier, carrier_for, carrier_of_sum, make_rescale
from adq_search.integer._graph import (
    ADDITIONS,
    NORMS,
    NetworkGraph,
    mean_window,
    moving_function,
    read_graph,
)
from adq_search.integer.inputs import MARGIN, InputStage, Seen, input_stage, seen_of
from adq_search.integer.network import IntegerLayer, IntegerNetwork
from adq_search.integer.shift_and_table import table_sums
from adq_search.integer.steps import (
    Accumulate,
    Add,
    Clip,
    Enter,
    Mean,
    Move,
    Operation,
    Requantize,
    Step,
    Sums,
)
from adq_search.integer.words import weight_words
from adq_search.layers import QuantLayer
from adq_search.quantizers._clipped import ClippedPowerWeight

#: Values of the largest tensor that go through a network together (more leave the cache), and the
#: fewest samples (a convolution prepares its weights anew at each call).
VALUES_AT_ONCE = 2**18
SAMPLES_AT_ONCE = 4


@torch.no_grad()
def lower(
    network: nn.Module, example: Tensor, *, table_fraction_bits: int | None = None
) -> IntegerNetwork:
    """Return a trained network in integers.

    Layers (convolutions and linear), batch norms in evaluation, ReLU and ReLU6, residual
    additions, mean and max pooling, zero padding, slices and flattening are known.

    Args:
        network: Quantized and trained, in evaluation mode; it is read, not changed.
        example: Some inputs, # shape: (N, *sample). They fix the shape; and eight times the largest
            input, and the largest factor of each ASQ layer, that are seen here is where inputs and
            factors are cut off.
        table_fraction_bits: None sums exactly. A number takes the paper's shifts and table
            (Eq. 18) for powers of a root of two, with so many fraction bits; 0 is the paper's, and
            loses accuracy.

    Raises:
        IntegerError: The network is in training mode, has a layer in floating point, or does
            something that has no integer form; the text names the module.
    """
    if any(module.training for module in network.modules()):
        msg = "Batch norms are folded as they are in evaluation. Call `network.eval()` first."
        raise IntegerError(msg)
    if any(p.device.type != "cpu" for p in (example, *network.parameters())):
        msg = "Integer networks run on the CPU. Move the network and the example: `.cpu()`."
        raise IntegerError(msg)
    graph = read_graph(network, example)
    lowering = _Lowering(graph, table_fraction_bits, _seen(network, example))
    return lowering.run(example)


@dataclass
class _Lowering:
    """The state of one lowering."""

    graph: NetworkGraph
    table_fraction_bits: int | None
    #: What the example shows of each layer's input.
    seen: dict[str, Seen]
    operations: list[Operation] = field(default_factory=list)
    layers: dict[str, IntegerLayer] = field(default_factory=dict)
    #: What the result of a node means, and under which name it stands.
    carriers: dict[fx.Node, Carrier] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    #: Layers whose codes the layer before makes.
    fused: dict[fx.Node, InputStage] = field(default_factory=dict)
    folded: set[fx.Node] = field(default_factory=set)

    def run(self, example: Tensor) -> IntegerNetwork:
        output = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._enter(node, example)
            elif node.op == "output":
                output = node.args[0]
            elif node not in self.folded:
                self._node(node)
        if not isinstance(output, fx.Node):
            msg = "An integer network returns one tensor, but this one returns several."
            raise IntegerError(msg)
        return IntegerNetwork(
            tuple(self.operations),
            self.layers,
            sample_shape=tuple(example.shape[1:]),
            output=self.names[output],
            output_unit=self.carriers[output].unit,
            samples_at_once=max(SAMPLES_AT_ONCE, VALUES_AT_ONCE // self.graph.largest_sample),
        )

    def _enter(self, node: fx.Node, example: Tensor) -> None:
        if self.carriers:
            msg = f"An integer network has one input, but this one also takes '{node.target}'."
            raise IntegerError(msg)
        carrier = carrier_for(float(example.abs().max()) * MARGIN)
        self.operations.append(Operation(node.name, ("",), Enter(carrier.unit, carrier.bound)))
        self._made(node, node.name, carrier)

    def _node(self, node: fx.Node) -> None:
        module = self.graph.module_of(node)
        sources = node.all_input_nodes
        if self.graph.spoils_input(node):
            msg = (
                f"{self.graph.place(node)} changes its input in place, which others read later. "
                "Take the form that does not (`inplace=False`, `a + b`)."
            )
            raise IntegerError(msg)
        move = moving_function(node, module)
        if isinstance(module, QuantLayer):
            self._layer(node, module)
        elif isinstance(module, NORMS):
            source = self._whole(sources[0])
            self._finish(node, source, norm=module)
        elif self.graph.clip_of(node) is not None:
            self._clip(node)
        elif move is not None and self.graph.keeps_samples(node):
            self._emit(node, sources, Move(move), self.carriers[sources[0]])
        elif node.target in ADDITIONS and len(sources) == 2 and not node.kwargs:
            self._add(node)
        elif mean_window(node, module, self.graph.shapes) is not None:
            self._mean(node)
        else:
            self._refuse(node, module)

    def _layer(self, node: fx.Node, layer: QuantLayer) -> None:
        name = str(node.target)
        if name in self.layers:
            msg = f"Layer '{name}' is called twice; an integer network calls each layer once."
            raise IntegerError(msg)
        source = node.all_input_nodes[0]
        stage = self.fused.get(node)
        codes, factor = f"{name}:codes", f"{name}:factor"
        if stage is None:
            stage = input_stage(layer.input_quantizer, self.carriers[source], self.seen[name])
            taken: tuple[str, ...] = (self.names[source],)
            if stage.factor is not None:
                self.operations.append(Operation(factor, taken, stage.factor))
                taken = (*taken, factor)
            self.operations.append(Operation(codes, taken, stage.codes))
        words = weight_words(layer.weight_quantizer, layer.get_parameter("weight"))
        geometry = Geometry.of(layer)
        sums: tuple[Sums, ...]
        fraction_bits = self.table_fraction_bits
        if fraction_bits is not None and isinstance(layer.weight_quantizer, ClippedPowerWeight):
            table = table_sums(layer, name, fraction_bits=fraction_bits)
            sums, ratios = (table,), [table.unit * stage.step]
        else:
            sums = tuple(
                ExactSum(bank, geometry, stage.max_code, name, stage.code_dtype)
                for bank in words.banks
            )
            ratios = [words.unit * (constant * stage.step) for constant in words.constants]
        names = tuple(f"{name}:sum{j}" for j in range(len(sums)))
        for result, exact in zip(names, sums, strict=True):
            self.operations.append(Operation(result, (codes,), Accumulate(exact)))
        self.layers[name] = IntegerLayer(
            name, words, sums, stage.step, codes, names, is_fused=node in self.fused
        )
        bias = layer.get_parameter("bias") if layer.bias is not None else None
        zeros = torch.zeros(len(words.unit), dtype=torch.float64)
        affine = Affine(
            sources=names if stage.factor is None else (*names, factor),
            ratios=ratios,
            offset=zeros if bias is None else bias.detach().double(),
            bounds=[exact.bounds.double() for exact in sums],
            n_trailing=len(geometry.stride),
            factor=stage.factor,
        )
        self._finish(node, affine)

    def _whole(self, source: fx.Node) -> Affine:
        """A tensor between layers as its own affine form, by channel (dimension 1)."""
        carrier, shape = self.carriers[source], self.graph.shapes[source]
        ones = torch.ones(shape[1], dtype=torch.float64)
        return Affine(
            sources=(self.names[source],),
            ratios=[ones * carrier.unit],
            offset=ones * 0.0,
            bounds=[ones * carrier.bound],
            n_trailing=len(shape) - 2,
        )

    def _finish(self, node: fx.Node, affine: Affine, norm: nn.Module | None = None) -> None:
        """Fold what follows the node, and requantize."""
        if norm is not None:
            affine = folded(affine, norm, self.graph.place(node))
        user = self.graph.only_user(node)
        following = None if user is None else self.graph.module_of(user)
        last = node
        # Channels of a batch norm stand in dimension 1.
        is_aligned = len(self.graph.shapes[node]) == 2 + affine.n_trailing
        if norm is None and is_aligned and user is not None and isinstance(following, NORMS):
            affine = folded(affine, following, self.graph.place(user))
            self.folded.add(user)
            last = user
        low, high, last = self._clips_after(last)
        reader = self.graph.only_user(last)
        stage = self._fusible(reader) if affine.factor is None else None
        if stage is not None and reader is not None:
            self.fused[reader] = stage
            step, result = stage.step, f"{reader.target}:codes"
            lowest = max(stage.lowest, 0 if low == 0 else stage.lowest)
            highest = min(stage.highest, _rounded(high / step))
            rescale = affine.rescale(step, lowest, highest)
            self.operations.append(
                Operation(result, affine.sources, Requantize(rescale, makes_codes=True))
            )
            return
        carrier = self._addend(last, carrier_for(affine.limit))
        unit = carrier.unit
        lowest, highest = _rounded(low / unit), _rounded(high / unit)
        step_of = affine.requantize(unit, lowest, highest)
        self.operations.append(Operation(last.name, affine.sources, step_of))
        self._made(last, last.name, Carrier(unit, min(carrier.bound, max(highest, 1))))

    def _addend(self, node: fx.Node, own: Carrier) -> Carrier:
        """Take the unit of the sum that alone reads a value, so that nothing is left to shift."""
        reader = self.graph.only_user(node)
        if reader is None or reader.target not in ADDITIONS:
            return own
        others = [other for other in reader.all_input_nodes if other is not node]
        if len(others) != 1 or others[0] not in self.carriers:
            return own
        unit = carrier_of_sum(own, self.carriers[others[0]]).unit
        return Carrier(unit, int(own.limit / unit) + 1)

    def _clips_after(self, node: fx.Node) -> tuple[float, float, fx.Node]:
        """Fold the clipping that alone reads a node: its range, and the last node of it."""
        low, high, last = -math.inf, math.inf, node
        while (user := self.graph.only_user(last)) is not None:
            clip = self.graph.clip_of(user)
            if clip is None:
                break
            low, high = max(low, clip[0]), min(high, clip[1])
            self.folded.add(user)
            last = user
        return low, high, last

    def _fusible(self, reader: fx.Node | None) -> InputStage | None:
        """The input stage of the layer that alone reads a value, where codes can be made at once.

        Any carrier does: only the step and the range of the codes are used.
        """
        layer = None if reader is None else self.graph.module_of(reader)
        if reader is None or not isinstance(layer, QuantLayer):
            return None
        seen = self.seen[str(reader.target)]
        stage = input_stage(layer.input_quantizer, Carrier(unit=1.0, bound=1), seen)
        return stage if stage.can_fuse else None

    def _clip(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        clip = self.graph.clip_of(node) or (-math.inf, math.inf)
        carrier = self.carriers[source]
        if clip == (-math.inf, math.inf):
            self._made(node, self.names[source], carrier)
            return
        lowest, highest = (_rounded(end / carrier.unit) for end in clip)
        bound = min(carrier.bound, max(highest, 1))
        self._emit(node, [source], Clip(lowest, highest), Carrier(carrier.unit, bound))

    def _add(self, node: fx.Node) -> None:
        sides = list(node.args[:2])
        carriers = [self.carriers[side] for side in sides if isinstance(side, fx.Node)]
        if len(carriers) != 2 or node.all_input_nodes != sides:
            self._refuse(node, None)
        out = carrier_of_sum(*carriers)
        first, second = (round(math.log2(out.unit / c.unit)) for c in carriers)
        low, high, last = self._clips_after(node)
        lowest, highest = _rounded(low / out.unit), _rounded(high / out.unit)
        bound = min(out.bound, max(highest, 1))
        step = Add((first, second), lowest, highest)
        self._emit(last, node.all_input_nodes, step, Carrier(out.unit, bound))

    def _mean(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        carrier = self.carriers[source]
        found = mean_window(node, self.graph.module_of(node), self.graph.shapes)
        assert found is not None
        rescale = make_rescale(
            [torch.tensor(1.0 / found.size, dtype=torch.float64)],
            torch.tensor(0.0, dtype=torch.float64),
            [torch.tensor(float(carrier.bound * found.size), dtype=torch.float64)],
            lowest=-NO_LIMIT,
            highest=NO_LIMIT,
        )
        mean = Mean(rescale, found.window, keeps_dimensions=found.keeps_dimensions)
        self._emit(node, [source], mean, carrier)

    def _emit(
        self, node: fx.Node, sources: Sequence[fx.Node], step: Step, carrier: Carrier
    ) -> None:
        names = tuple(self.names[source] for source in sources)
        self.operations.append(Operation(node.name, names, step))
        self._made(node, node.name, carrier)

    def _made(self, node: fx.Node, name: str, carrier: Carrier) -> None:
        self.names[node] = name
        self.carriers[node] = carrier

    def _refuse(self, node: fx.Node, module: nn.Module | None) -> NoReturn:
        place = self.graph.place(node)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            msg = f"{place} is in floating point. Give it a precision in the policy."
        else:
            msg = (
                f"{place} has no integer form; see `lower` for what has. Replace it, or leave "
                "the network in fake quantization."
            )
        raise IntegerError(msg)


def _seen(network: nn.Module, example: Tensor) -> dict[str, Seen]:
    """Run the example and note what each quantized layer sees."""
    seen: dict[str, Seen] = {}

    def look(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantLayer)
        seen[name] = seen_of(layer.input_quantizer, args[0])

    handles = [
        layer.register_forward_pre_hook(partial(look, name))
        for name, layer in quantized_layers(network).items()
    ]
    try:
        network(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rounded(value: float) -> int:
    """Round half up; infinities become limits that no value reaches."""
    return math.floor(max(-NO_LIMIT, min(NO_LIMIT, value)) + 0.5)
