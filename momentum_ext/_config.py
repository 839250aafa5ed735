"""What was built, and whether it fits the torch that is running.

A module compiled for one torch and loaded into another crashes or, worse, does not: the versions
are compared before the compiled module is loaded.
"""

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent


def import_compiled_module() -> None:
    """Import `momentum_ext._C`, or say why that cannot be and what to do about it.

    Raises:
        ImportError: the module has not been built for this Python; or it was built for another
            version of torch; or the environment variable MOMENTUM_EXT_ISA names an instruction
            set that is unknown or that this machine lacks.
    """
    if not any((_PACKAGE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise ImportError(
            f"momentum_ext is not compiled for this Python: {_PACKAGE} has no _C{EXTENSION_SUFFIXES[0]}. {_remedy()}"
        )
    from momentum_ext import _build_info

    if torch.__version__ != _build_info.TORCH_VERSION:
        raise ImportError(
            f"momentum_ext was built for torch {_build_info.TORCH_VERSION}, "
            f"but torch {torch.__version__} is running. {_remedy()}"
        )
    importlib.import_module("momentum_ext._C")


def _remedy() -> str:
    source = _PACKAGE.parent
    if (source / "setup.py").exists():
        return (
            f"Build it: cd {source} && pip install --no-build-isolation -e . "
            "(or, if it is installed elsewhere, start Python outside of this source tree)"
        )
    return "Build it again, in its source tree: pip install --no-build-isolation ."


def _cuda_row() -> str:
    from momentum_ext import _build_info

    if _build_info.CUDA_VERSION is None:
        return "none (CPU build)"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{_build_info.CUDA_VERSION} for {_build_info.CUDA_ARCHS}; devices: {', '.join(devices) or 'none'}"


def show_config() -> None:
    """Print what was built, for which torch, and which instruction set is in use."""
    from momentum_ext import _C, __version__, _build_info

    build = _C.build_info()
    rows = {
        "momentum_ext": __version__,
        "built for torch": _build_info.TORCH_VERSION,
        "running torch": torch.__version__,
        "compiler": build["compiler"].strip(),
        "compiler flags": _build_info.CXX_FLAGS,
        "CUDA": _cuda_row(),
        "instruction set": f"{_C.isa()} (this machine can run: {', '.join(_C.isas())})",
        "threads": f"{torch.get_num_threads()} ({build['threads']})",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
