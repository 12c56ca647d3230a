"""The processor that is compiled for: the host's, or what the environment narrows it to.

``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` narrow Numba itself; here they hold without it.
"""

from __future__ import annotations

import os


def host_name() -> str:
    """Return the processor's name in LLVM's words."""
    import llvmlite.binding as llvm

    return os.environ.get("NUMBA_CPU_NAME") or str(llvm.get_host_cpu_name())


def host_features() -> str:
    """Return what the processor has, in LLVM's words: names behind ``+`` and ``-``."""
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is not None:  # an empty text is a choice
        return features
    if os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic":
        return ""
    import llvmlite.binding as llvm

    return str(llvm.get_host_cpu_features().flatten())
