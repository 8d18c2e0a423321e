"""Networks that leave the house: a hardware package, and ONNX."""

from adq_search.export._forms import INPUT_FORMS, WEIGHT_FORMS, InputForm, WeightForm
from adq_search.export._packing import pack, packed_bytes, unpack
from adq_search.export.compare import CodeAgreement, GraphAgreement, compare_onnx
from adq_search.export.integer_file import write_integer_onnx
from adq_search.export.onnx_file import run_onnx, write_onnx
from adq_search.export.package import DESCRIPTION, decoded_weight, load_package_, write_package
from adq_search.export.qonnx_file import holds_qonnx, write_qonnx

__all__ = [
    "DESCRIPTION",
    "INPUT_FORMS",
    "WEIGHT_FORMS",
    "CodeAgreement",
    "GraphAgreement",
    "InputForm",
    "WeightForm",
    "compare_onnx",
    "decoded_weight",
    "holds_qonnx",
    "load_package_",
    "pack",
    "packed_bytes",
    "run_onnx",
    "unpack",
    "write_integer_onnx",
    "write_onnx",
    "write_package",
    "write_qonnx",
]
