"""Fill a latency table for the CPU at hand with onnxruntime: float and uniform 8 bit.

Usage: python results/latency_cpu/run.py [--model torchvision:resnet18] [--input 3x224x224]
       [--threads 1] [--seconds 0.4] [--out results/latency_cpu]

Every different layer is timed by itself. Writes cpu.csv (the table), cpu.yaml (a hardware file that
uses it), spread.csv (median, quartiles and runs of every cell) and run.json. Then:

    adq-search cost --model torchvision:resnet18 --input 3x224x224 --uniform W8A8 \
        --hardware results/latency_cpu/cpu.yaml

A layer's stride and padding are not in its signature; they follow from its input and output shapes
where the dilation is 1, and the script checks that the output has the shape that was traced.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision import models

from adq_search.hardware import precision_key, signature_of
from adq_search.policy import FLOAT, LayerPrecision
from adq_search.provenance import provenance
from adq_search.tasks import load_task
from adq_search.tracing import trace

SEED = 0
UNIFORM_8 = LayerPrecision(8, 8, "lsq")
HARDWARE = """# Latencies measured on one CPU by results/latency_cpu/run.py; see README.md.
# Energies and areas are those of the 45 nm accelerator and say nothing about this CPU.
extends: post_asic_45nm
name: cpu
description: {cpu}, onnxruntime {version}, {threads} thread(s), one image
bits: {{weight: [8], input: [8]}}
datapaths:
  lsq: [{{unit: uniform}}]
unlisted_quantizers: refuse
array: null
latency_table:
  file: cpu.csv
  source: "measured: results/latency_cpu/run.py, median of repeated runs"
"""


def main():
    words = argparse.ArgumentParser()
    words.add_argument("--model", default="torchvision:resnet18")
    words.add_argument("--input", default="3x224x224")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--seconds", type=float, default=0.4)
    words.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = words.parse_args()
    summary = traced(args.model, args.input)
    layers = {signature_of(layer): layer for layer in summary.layers}
    table, spread = [], []
    for number, (signature, layer) in enumerate(layers.items(), start=1):
        row = {"signature": signature, "unit": "us"}
        for precision, make in ((FLOAT, float_model), (UNIFORM_8, integer_model)):
            key = precision_key(precision)
            times = measured(make(layer), layer, args.threads, args.seconds)
            low, median, high = statistics.quantiles(times, n=4)
            row[key] = f"{median:.2f}"
            cells = {"q1_us": low, "median_us": median, "q3_us": high}
            spread.append(
                {"signature": signature, "precision": key, "runs": len(times)}
                | {name: f"{value:.2f}" for name, value in cells.items()}
            )
        table.append(row)
        print(f"{number}/{len(layers)}", *row.values(), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "cpu.csv", table)
    write(args.out / "spread.csv", spread)
    cpu, version = cpu_name(), onnxruntime.__version__
    text = HARDWARE.format(cpu=cpu, version=version, threads=args.threads)
    (args.out / "cpu.yaml").write_text(text)
    made = provenance(seed=SEED) | {"cpu": cpu, "onnxruntime": version, "onnx": onnx.__version__}
    (args.out / "run.json").write_text(json.dumps(made, indent=2) + "\n")


def traced(model, shape):
    library, _, name = model.partition(":")
    if library != "torchvision":
        task = load_task(model)
        return trace(task.make_network(), task.example())
    sizes = [int(size) for size in shape.split("x")]
    return trace(models.get_model(name, weights=None), torch.zeros(1, *sizes))


def geometry(layer):
    """Return strides and padding (begin, then end) that lead from the input to the output."""
    kernel, inputs, outputs = layer.weight_shape[2:], layer.input_shape[1:], layer.output_shape[1:]
    strides = [max(1, i // o) for i, o in zip(inputs, outputs, strict=True)]
    missing = [
        max(0, (o - 1) * s + k - i)
        for i, o, s, k in zip(inputs, outputs, strides, kernel, strict=True)
    ]
    return strides, [m // 2 for m in missing] + [m - m // 2 for m in missing]


def float_model(layer):
    weight = random_weight(layer, np.float32)
    if layer.kind == "linear":
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    else:
        node = conv_node(layer, "Conv", ["x", "w"])
    return model_of(layer, TensorProto.FLOAT, [node], [("w", weight)])


def integer_model(layer):
    """Unsigned 8-bit inputs, signed 8-bit weights, 32-bit accumulators, 8-bit outputs."""
    weight = random_weight(layer, np.int8)
    scales = [("sx", np.float32(0.02)), ("sw", np.float32(0.01)), ("sy", np.float32(0.05))]
    zeros = [("zx", np.uint8(0)), ("zw", np.int8(0)), ("zy", np.uint8(0))]
    inputs = ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"]
    if layer.kind == "linear":
        node = helper.make_node("QLinearMatMul", inputs, ["y"])
    else:
        node = conv_node(layer, "QLinearConv", inputs)
    return model_of(layer, TensorProto.UINT8, [node], [("w", weight), *scales, *zeros])


def conv_node(layer, operator, inputs):
    strides, pads = geometry(layer)
    return helper.make_node(operator, inputs, ["y"], strides=strides, pads=pads, group=layer.groups)


def random_weight(layer, dtype):
    random = np.random.default_rng(SEED)
    weight = random.integers(-127, 128, layer.weight_shape).astype(dtype)
    return np.ascontiguousarray(weight.T) if layer.kind == "linear" else weight


def model_of(layer, element, nodes, constants):
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, [1, *layer.input_shape])],
        [helper.make_tensor_value_info("y", element, [1, *layer.output_shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def measured(model, layer, threads, seconds):
    """Return the microseconds of every run after a warm-up of a tenth of the time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    is_float = session.get_inputs()[0].type == "tensor(float)"
    values = np.random.default_rng(SEED).integers(0, 256, (1, *layer.input_shape))
    feed = {"x": values.astype(np.float32 if is_float else np.uint8)}
    (output,) = session.run(None, feed)
    assert output.shape == (1, *layer.output_shape), (layer.name, output.shape)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 15:
        start = time.perf_counter()
        session.run(None, feed)
        times.append(1e6 * (time.perf_counter() - start))
    return times[len(times) // 10 :]


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
