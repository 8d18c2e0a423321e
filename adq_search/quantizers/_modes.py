"""Which form of the quantizers' arithmetic runs: `ADQ_SEARCH_COMPILE`.

`auto`      C++ (`_native`) on CPUs, `torch.compile` (`_compile`) on other devices; tensor
            operations where there is no compiler
`native`    the same, and an error where the C++ cannot be built
`inductor`  `torch.compile` on CPUs too
`off`       tensor operations everywhere
"""

from __future__ import annotations

import os

from adq_search.errors import QuantizerError

MODES = ("auto", "native", "inductor", "off")


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
