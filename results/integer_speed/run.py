"""Time integer networks against their float network and against onnxruntime's ConvInteger.

Usage: python results/integer_speed/run.py [--threads N] [--repeats N] [--networks NAME ...]

In every round each contestant runs once, in turn, on the same cores. Writes speed.csv (a row a
network, scheme and round), speed.md (medians and spread) and provenance.json. Weights are random:
they do not change the time. Needs onnx and onnxruntime.
"""

import argparse
import copy
import csv
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision

from adq_search.convert import apply_policy_
from adq_search.integer import lower, verify
from adq_search.integer._exact import exact_float32
from adq_search.policy import LayerPrecision, Policy
from adq_search.provenance import provenance
from adq_search.tasks.networks import resnet20
from adq_search.tracing import parametric_layers

HERE = Path(__file__).parent
SEED = 0
NETWORKS = {
    "resnet20": (resnet20, (64, 3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, (8, 3, 224, 224)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, (8, 3, 224, 224)),
}
#: Name, scheme, bits, options, share of the float network's images per second to reach.
SCHEMES = [
    ("uniform W8A8", "lsq", 8, {}, 0.5),
    ("uniform W4A4", "lsq", 4, {}, 0.5),
    ("POST dual W4A4", "post", 4, {}, 0.25),
    ("POST 45/64 W4A4", "post", 4, {"post": {"sqrt_half": "45/64"}}, 0.25),
    ("ASQ W4A4", "asq", 4, {}, None),
]
CONV_INTEGER_TARGET = 5.0


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def conv_integer_of(sums, codes, threads):
    """Return an onnxruntime session of ConvInteger alone, and its inputs."""
    geometry = sums.geometry
    pads = geometry.plain_padding
    inputs = codes.contiguous().numpy().astype(np.int8 if codes.min() < 0 else np.uint8)
    words = onnx.numpy_helper.from_array(sums.words.numpy().astype(np.int8), "w")
    node = onnx.helper.make_node(
        "ConvInteger",
        ["x", "w"],
        ["y"],
        strides=geometry.stride,
        dilations=geometry.dilation,
        pads=[*pads, *pads],
        group=geometry.groups,
    )
    kind = onnx.TensorProto.INT8 if inputs.dtype == np.int8 else onnx.TensorProto.UINT8
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("x", kind, inputs.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)],
        [words],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, {"x": inputs}


def make(name):
    """Return a float network with plausible batch norms, and inputs."""
    torch.manual_seed(SEED)
    factory, shape = NETWORKS[name]
    network = factory()
    inputs = torch.randn(shape)
    with torch.no_grad():
        for _ in range(2):
            network(inputs)
    return network.eval(), inputs


def race(name, scheme, repeats, threads):
    """Yield a row a round for one network under one scheme."""
    label, kind, bits, options, _ = scheme
    floating, inputs = make(name)
    quantized = copy.deepcopy(floating)
    precision = LayerPrecision(bits, bits, kind)
    policy = Policy.uniform(tuple(parametric_layers(quantized)), precision, options=options)
    apply_policy_(quantized, policy, inputs)
    quantized.eval()
    integer = lower(quantized, inputs)
    agreement = verify(quantized, integer, [inputs])
    if agreement.unexplained:
        raise SystemExit(f"{name} {label}: {agreement.unexplained} codes differ without a tie")
    layers = [layer for layer in integer.layers.values() if layer.sums[0].geometry.stride]
    codes = integer.integers(inputs, [layer.codes for layer in layers])
    sessions = []
    if kind == "lsq":  # words of 8 bits
        sessions = [conv_integer_of(la.sums[0], codes[la.codes], threads) for la in layers]
        for layer, (session, feed) in zip(layers, sessions, strict=True):
            with exact_float32():
                ours = layer.sums[0].fast(codes[layer.codes]).to(torch.int32).numpy()
            np.testing.assert_array_equal(session.run(None, feed)[0], ours)

    parts = inputs.split(integer.samples_at_once)

    def float_in_parts():
        for part in parts:
            floating(part)

    def our_sums():
        with exact_float32():
            for layer in layers:
                layer.sums[0].fast(codes[layer.codes])

    def their_sums():
        for session, feed in sessions:
            session.run(None, feed)

    for repeat in range(repeats):
        with torch.no_grad():  # the float network may choose its batch as well
            float_s = min(seconds(lambda: floating(inputs)), seconds(float_in_parts))
            fake_s = seconds(lambda: quantized(inputs))
        row = {
            "network": name,
            "scheme": label,
            "repeat": repeat,
            "images": len(inputs),
            "samples_at_once": integer.samples_at_once,
            "float_s": float_s,
            "fake_quantized_s": fake_s,
            "integer_s": seconds(lambda: integer(inputs)),
            "our_sums_s": seconds(our_sums) if sessions else None,
            "conv_integer_s": seconds(their_sums) if sessions else None,
            "codes": agreement.codes,
            "ties": agreement.ties,
        }
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        yield row


def summary(rows):
    lines = [
        "| network | scheme | float, images/s | integer, images/s | integer / float | target "
        "| our sums / ConvInteger | target |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    targets = {label: target for label, _, _, _, target in SCHEMES}
    cases = dict.fromkeys((r["network"], r["scheme"]) for r in rows)
    for network, scheme in cases:
        own = [r for r in rows if (r["network"], r["scheme"]) == (network, scheme)]
        shares = [r["float_s"] / r["integer_s"] for r in own]
        target = targets[scheme]
        cells = [
            network,
            scheme,
            f"{statistics.median(r['images'] / r['float_s'] for r in own):.0f}",
            f"{statistics.median(r['images'] / r['integer_s'] for r in own):.0f}",
            f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})",
            "-" if target is None else f"{target:g}",
        ]
        if own[0]["conv_integer_s"] is None:
            cells += ["-", "-"]
        else:
            ratios = [r["conv_integer_s"] / r["our_sums_s"] for r in own]
            median = f"{statistics.median(ratios):.1f}"
            cells += [
                f"{median} ({min(ratios):.1f} to {max(ratios):.1f})",
                f"{CONV_INTEGER_TARGET:g}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for name in asked.networks:
        for scheme in SCHEMES:
            rows += race(name, scheme, asked.repeats, asked.threads)
    with (HERE / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    made = provenance(seed=SEED)
    made["versions"] |= {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    made["threads"] = asked.threads
    (HERE / "provenance.json").write_text(json.dumps(made, indent=2) + "\n")
    (HERE / "speed.md").write_text(summary(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
