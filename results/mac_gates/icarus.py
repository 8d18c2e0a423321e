"""Run a circuit's Verilog in Icarus Verilog over input vectors."""

import subprocess
from pathlib import Path

import numpy as np
from designs import top_of

RTL = Path(__file__).parent / "rtl"


def simulate(design, inputs, folder):
    """Return the outputs after every vector, by port, as int64 codes of (steps,).

    Raises:
        RuntimeError: Icarus found an error, or an output is not 0 or 1 in every bit.
    """
    count = len(inputs[next(iter(design.inputs))])
    fields = {**design.inputs, **({"first": 1} if design.is_clocked else {})}
    _write_hex(folder / "vectors.hex", fields, inputs)
    (folder / "top.v").write_text(top_of(design))
    (folder / "bench.v").write_text(_bench(design, fields, count))
    sources = [str(p) for p in sorted(RTL.glob("*.v"))]
    _run(["iverilog", "-g2005", "-s", "bench", "-o", "bench", "bench.v", "top.v", *sources], folder)
    _run(["vvp", "-n", "bench"], folder)
    lines = (folder / "outputs.hex").read_text().split()
    if len(lines) != count or any("x" in line or "z" in line for line in lines):
        msg = f"{design.label}: {count} vectors gave {len(lines)} outputs, some may be undefined."
        raise RuntimeError(msg)
    words = [int(line, 16) for line in lines]
    found, place = {}, 0
    for name, bits in design.outputs.items():
        mask = 2**bits - 1
        found[name] = np.array([(w >> place) & mask for w in words], dtype=np.int64)
        place += bits
    return found


def _run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or "error" in done.stderr.lower():
        msg = f"`{' '.join(command[:3])} ...` failed: {done.stdout}{done.stderr}"
        raise RuntimeError(msg)


def _write_hex(path, fields, inputs):
    """One line a vector, the first field in the lowest bits."""
    if sum(fields.values()) <= 62:
        packed, place = 0, 0
        for name, bits in fields.items():
            packed = packed | (np.asarray(inputs[name]) << place)
            place += bits
        lines = packed.tolist()
    else:
        lines = []
        for row in zip(*(inputs[name] for name in fields), strict=True):
            word, place = 0, 0
            for value, bits in zip(row, fields.values(), strict=True):
                word |= int(value) << place
                place += bits
            lines.append(word)
    path.write_text("\n".join(f"{word:x}" for word in lines) + "\n")


def _bench(design, fields, count):
    total = sum(fields.values())
    inputs = "\n".join(f"    reg [{bits - 1}:0] {name};" for name, bits in fields.items())
    outputs = "\n".join(f"    wire [{bits - 1}:0] {name};" for name, bits in design.outputs.items())
    ports = [f".{n}({n})" for n in (*design.inputs, *design.outputs)]
    clear = clock = ""
    if design.is_clocked:
        ports += [".clk(clk)", ".clear(clear)"]
        clear = "if (first) begin clear = 1; #1 clear = 0; end"
        clock = "#1 clk = 1; #1 clk = 0;"
    return f"""module bench;
    reg [{total - 1}:0] vectors [0:{count - 1}];
    reg clk = 0, clear = 0;
{inputs}
{outputs}
    top dut ({", ".join(ports)});
    integer i, file;
    initial begin
        $readmemh("vectors.hex", vectors);
        file = $fopen("outputs.hex", "w");
        for (i = 0; i < {count}; i = i + 1) begin
            {{{", ".join(reversed(fields))}}} = vectors[i];
            {clear}
            {clock}
            #1 $fdisplay(file, "%h", {{{", ".join(reversed(design.outputs))}}});
        end
        $finish;
    end
endmodule
"""
