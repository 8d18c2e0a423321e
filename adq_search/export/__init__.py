"""Networks that leave the house: a hardware package, and ONNX; and whether they still agree."""

from adq_search.export._forms import INPUT_FORMS, WEIGHT_FORMS, InputForm, WeightForm
from adq_search.export._packing import pack, packed_bytes, unpack
from adq_search.export.agreement import ExportAgreement, Form, Outcome, SumAgreement, compare
from adq_search.export.integer_file import int8_banks, write_integer_onnx
from adq_search.export.onnx_file import run_onnx, write_onnx
from adq_search.export.package import (
    DESCRIPTION,
    decoded_weight,
    load_package_,
    read_description,
    read_vectors,
    write_package,
)
from adq_search.export.qonnx_file import write_qonnx
from adq_search.export.runners import graph_form, onnxruntime_form, qonnx_form

__all__ = [
    "DESCRIPTION",
    "INPUT_FORMS",
    "WEIGHT_FORMS",
    "ExportAgreement",
    "Form",
    "InputForm",
    "Outcome",
    "SumAgreement",
    "WeightForm",
    "compare",
    "decoded_weight",
    "graph_form",
    "int8_banks",
    "load_package_",
    "onnxruntime_form",
    "pack",
    "packed_bytes",
    "qonnx_form",
    "read_description",
    "read_vectors",
    "run_onnx",
    "unpack",
    "write_integer_onnx",
    "write_onnx",
    "write_package",
    "write_qonnx",
]
