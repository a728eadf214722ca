"""The kernel of the CPU, in C++: built by the machine's own compiler when it is asked for, and kept by torch."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path

import torch

_SOURCES = Path(__file__).with_name("fused")
# No product is fused with a sum: vectors and what is left over of them would round differently, and ties part.
_FLAGS = ["-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
# As torch names what the processor has, rather than all of it: machines that share a home directory may differ.
_VECTORS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}


def build() -> None:
    """Build the kernel, or find it built before, and register it for CPU tensors.

    The first time takes a quarter of a minute; what is built lies in torch's cache of extensions
    (TORCH_EXTENSIONS_DIR), one for each version of torch, of the source and kind of processor.

    Raises: ImportError: there is no compiler or no ninja, or the compiler refuses.
    """
    path = os.environ.get("PATH", os.defpath)
    # Where pip puts ninja, also if the virtual environment is not activated.
    os.environ["PATH"] = os.pathsep.join((path, str(Path(sys.executable).parent)))
    try:
        _load()
    except Exception as error:
        raise ImportError(
            'ROBUSTGRAD_KERNEL is "cpp", and the C++ kernel cannot be built. It needs a C++ compiler (g++ or clang++) '
            'and ninja (pip install "robustgrad[cpp]"); or unset ROBUSTGRAD_KERNEL, nothing else needs it.'
        ) from error
    finally:
        os.environ["PATH"] = path
    logging.getLogger(__name__).info("ROBUSTGRAD_KERNEL=cpp: the C++ kernel solves on the CPU.")


def _load() -> None:
    from torch.utils.cpp_extension import load

    sources = sorted(_SOURCES.iterdir())
    flags = _FLAGS + _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    name = _name(torch.__version__, *flags, *(path.read_text() for path in sources))
    load(name, [str(path) for path in sources if path.suffix == ".cpp"], extra_cflags=flags, is_python_module=False)


def _name(*parts: str) -> str:
    # Ninja compares times of files alone, and an unpacked wheel may be older than what was built before.
    return "robustgrad_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
