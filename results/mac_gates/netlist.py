"""Synthesise a circuit with yosys to its own generic gates; count them and their switching.

No cell library is used. A gate's weight is in gate equivalents (GE): one two-input NAND = 1.
Weights are transistor counts of static CMOS over four, as in yosys' `stat -tech cmos`, but for the
exclusive or and the flip-flop, which are the public areas of ZigZag's 28 nm model (2.4 and 6 NAND).
"""

import json
import subprocess
from dataclasses import dataclass

import numpy as np
from designs import top_of
from icarus import RTL

GATES = "AND,NAND,OR,NOR,ANDNOT,ORNOT,XOR,XNOR,MUX,AOI3,OAI3"
GATE_GE = {
    "NOT": 0.5,
    "NAND": 1.0,
    "NOR": 1.0,
    "AND": 1.5,
    "OR": 1.5,
    "ANDNOT": 1.5,
    "ORNOT": 1.5,
    "AOI3": 1.5,
    "OAI3": 1.5,
    "MUX": 3.0,
    "XOR": 2.4,
    "XNOR": 2.4,
    "DFF": 6.0,
    "RESET": 1.0,  # beside the flip-flop: two NAND2 in place of two inverters
    "CLOCK_GATE": 5.0,  # one for each enable: a latch and an AND
}
#: GE that one clock cycle switches in a flip-flop or clock gate, whether its data change or not
#: (ZigZag: a flip-flop has the capacitance of three NAND).
CLOCK_GE = 3.0

#: Of the mask with a one in every lane, and of the inputs A, B, C, S.
_GATE_FUNCTIONS = {
    "NOT": lambda m, a: m ^ a,
    "AND": lambda _, a, b: a & b,
    "NAND": lambda m, a, b: m ^ (a & b),
    "OR": lambda _, a, b: a | b,
    "NOR": lambda m, a, b: m ^ (a | b),
    "XOR": lambda _, a, b: a ^ b,
    "XNOR": lambda m, a, b: m ^ a ^ b,
    "ANDNOT": lambda m, a, b: a & (m ^ b),
    "ORNOT": lambda m, a, b: a | (m ^ b),
    "MUX": lambda m, a, b, s: (a & (m ^ s)) | (b & s),
    "AOI3": lambda m, a, b, c: m ^ ((a & b) | c),
    "OAI3": lambda m, a, b, c: m ^ ((a | b) & c),
}


@dataclass(frozen=True)
class Netlist:
    """A synthesised circuit.

    Args:
        gates: (type, output net, input nets) in an order in which inputs come first.
        flops: (output net, data net, enable net or None, value after clear).
        ports: Nets of each port, lowest bit first; "0" and "1" are constants.
        depth: Gates on the longest path.
    """

    gates: list
    flops: list
    ports: dict
    depth: int

    @property
    def counts(self):
        """Number of gates by type, flip-flops and clock gates included."""
        found = {}
        for kind, _, _ in self.gates:
            found[kind] = found.get(kind, 0) + 1
        if self.flops:
            found["DFF"] = found["RESET"] = len(self.flops)
            n_gated = len({enable for _, _, enable, _ in self.flops if enable is not None})
            if n_gated:
                found["CLOCK_GATE"] = n_gated
        return dict(sorted(found.items()))


def gate_equivalents(counts, weights=GATE_GE):
    """GE of all gates and of the gates without registers and clock gates."""
    total = sum(n * weights[kind] for kind, n in counts.items())
    clocked = sum(counts.get(k, 0) * weights[k] for k in ("DFF", "RESET", "CLOCK_GATE"))
    return total, total - clocked


def synthesize(design, folder):
    """Return the circuit's netlist.

    Raises:
        RuntimeError: yosys failed, or left a cell that is no gate of the table.
    """
    (folder / "top.v").write_text(top_of(design))
    # Relative names: yosys names gates after the source, and abc's result depends on their order.
    (folder / "rtl").symlink_to(RTL, target_is_directory=True)
    sources = " ".join(f"rtl/{p.name}" for p in sorted(RTL.glob("*.v")))
    script = (
        f"read_verilog {sources} top.v; synth -flatten -top top; "
        f"dfflegalize -cell $_DFF_PP?_ x -cell $_DFFE_PP?P_ x; opt_merge; "
        f"abc -g {GATES}; opt_merge; opt_clean -purge; write_json netlist.json"
    )
    done = subprocess.run(
        ["yosys", "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        msg = f"yosys failed on {design.label}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise RuntimeError(msg)
    module = json.loads((folder / "netlist.json").read_text())["modules"]["top"]
    return _parse(module, design)


def _parse(module, design):
    pending, flops = {}, []
    for cell in module["cells"].values():
        nets = {pin: bits[0] for pin, bits in cell["connections"].items()}
        kind = cell["type"].strip("$").strip("_")
        if kind in _GATE_FUNCTIONS:
            inputs = [nets[pin] for pin in ("A", "B", "C", "S") if pin in nets]
            pending[nets["Y"]] = (kind, nets["Y"], inputs)
        elif kind.startswith("DFF"):
            code = kind.split("_")[1]  # clock edge, reset edge and value, enable level
            if code[0] != "P" or code[1] != "P" or code[3:] not in ("", "P"):
                msg = f"{design.label}: flip-flop {kind} has another polarity than the table reads."
                raise RuntimeError(msg)
            flops.append((nets["Q"], nets["D"], nets.get("E"), int(code[2])))
        else:
            msg = f"{design.label}: yosys left a cell {cell['type']}, which has no weight."
            raise RuntimeError(msg)
    level, ordered = {}, []
    for net in pending:
        _visit(net, pending, level, ordered)
    ports = {name: port["bits"] for name, port in module["ports"].items()}
    return Netlist(ordered, flops, ports, max(level.values(), default=0))


def _visit(root, pending, level, ordered):
    """Depth-first, without recursion: a gate follows the gates that feed it."""
    stack = [root]
    while stack:
        net = stack[-1]
        if net in level:
            stack.pop()
            continue
        feeding = [n for n in pending[net][2] if n in pending]
        missing = [n for n in feeding if n not in level]
        if missing:
            stack += missing
            continue
        level[net] = 1 + max((level[n] for n in feeding), default=0)
        ordered.append(pending[net])
        stack.pop()


def to_lanes(values, bits):
    """Bit j of every lane as one Python integer, lowest bit first."""
    values = np.asarray(values, dtype=np.int64 if bits <= 62 else object)
    return [
        int.from_bytes(
            np.packbits(((values >> j) & 1).astype(np.uint8), bitorder="little").tobytes(), "little"
        )
        for j in range(bits)
    ]


def from_lanes(words, lanes):
    """Codes of every lane from one integer a bit."""
    found = np.zeros(lanes, dtype=np.int64)
    size = -(-lanes // 8)
    for j, word in enumerate(words):
        raw = np.frombuffer(word.to_bytes(size, "little"), dtype=np.uint8)
        found |= np.unpackbits(raw, bitorder="little")[:lanes].astype(np.int64) << j
    return found


def run_lanes(netlist, design, inputs, first):
    """Simulate independent units side by side, without delays, and count what switches.

    Args:
        netlist: The circuit.
        design: What it was made from.
        inputs: By port, codes of shape (steps, lanes).
        first: For every step whether the registers are cleared before it.

    Returns:
        Outputs after every step by port, of shape (steps, lanes), and the GE switched in one unit
        and step: weight of each gate and flip-flop whose output changed, and of what was clocked.
    """
    steps, lanes = inputs[next(iter(design.inputs))].shape
    mask = (1 << lanes) - 1
    values = {"0": 0, "1": mask, "x": 0}
    gates = [(_GATE_FUNCTIONS[k], GATE_GE[k], out, ins) for k, out, ins in netlist.gates]
    flop_ge = GATE_GE["DFF"] + GATE_GE["RESET"]
    weights = [(out, ge) for _, ge, out, _ in gates] + [(q, flop_ge) for q, *_ in netlist.flops]
    gating = {e for _, _, e, _ in netlist.flops if e is not None}
    found = {name: [] for name in design.outputs}
    switched, settled = 0.0, values
    for step in range(steps):
        if first[step]:
            if step:  # the last sum was taken over before it is cleared: two changes
                for q, *_ in netlist.flops:
                    switched += (values[q] ^ settled[q]).bit_count() * flop_ge
                    settled[q] = values[q]
            values.update({q: mask * start for q, _, _, start in netlist.flops})
        for name, bits in design.inputs.items():
            values.update(zip(netlist.ports[name], to_lanes(inputs[name][step], bits), strict=True))
        for function, _, out, ins in gates:
            values[out] = function(mask, *[values[n] for n in ins])
        if step:
            switched += sum((values[n] ^ settled[n]).bit_count() * ge for n, ge in weights)
            switched += CLOCK_GE * lanes * len(gating)
            for _, _, enable, _ in netlist.flops:
                switched += CLOCK_GE * (mask if enable is None else values[enable]).bit_count()
        settled = dict(values)
        following = {}
        for q, d, enable, _ in netlist.flops:
            on = mask if enable is None else values[enable]
            following[q] = (values[d] & on) | (values[q] & (mask ^ on))
        values.update(following)
        if netlist.flops:
            for function, _, out, ins in gates:
                values[out] = function(mask, *[values[n] for n in ins])
        for name in design.outputs:
            found[name].append(from_lanes([values[n] for n in netlist.ports[name]], lanes))
    outputs = {name: np.stack(rows) for name, rows in found.items()}
    return outputs, switched / (lanes * max(steps - 1, 1))
