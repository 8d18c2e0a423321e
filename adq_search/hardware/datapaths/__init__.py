"""Datapaths: the arithmetic units that multiply and accumulate, one kind a file."""

from adq_search.hardware.datapaths._base import Datapath, Mac, MacJob, Widths, shifter_size
from adq_search.hardware.datapaths._registry import (
    cheapest_mac,
    datapath_names,
    datapaths_of,
    make_datapath,
    register_datapath,
)
from adq_search.hardware.datapaths.codebook import Codebook
from adq_search.hardware.datapaths.codebook_bins import CodebookBins
from adq_search.hardware.datapaths.post_broadcast import PostBroadcast
from adq_search.hardware.datapaths.post_dual import PostDual
from adq_search.hardware.datapaths.post_lut import PostLut, PostLutLiteral
from adq_search.hardware.datapaths.pot import PotShift
from adq_search.hardware.datapaths.root_accumulators import RootAccumulators
from adq_search.hardware.datapaths.uniform import Uniform

__all__ = [
    "Codebook",
    "CodebookBins",
    "Datapath",
    "Mac",
    "MacJob",
    "PostBroadcast",
    "PostDual",
    "PostLut",
    "PostLutLiteral",
    "PotShift",
    "RootAccumulators",
    "Uniform",
    "Widths",
    "cheapest_mac",
    "datapath_names",
    "datapaths_of",
    "make_datapath",
    "register_datapath",
    "shifter_size",
]
