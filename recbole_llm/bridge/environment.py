"""Collect what a bug report should contain: versions, device, kernel backend, repairs, caches."""

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import recbole_llm

PACKAGES = (
    "recbole",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "hyperopt",
    "setuptools",
    "ray",
)
# what changes how a run behaves
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TRITON_INTERPRET")
PREFIX = "RECBOLE_LLM_"


def versions() -> dict[str, str]:
    """Return installed versions by distribution name, ours and Python's included; absent packages are left out."""
    found = {"recbole-llm": recbole_llm.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def kernels() -> dict[str, str]:
    """Describe the kernel package that is imported: its file, its version and the distributions that hold it.

    recbole-llm ships the package, and recbole-llm-kernels is the package alone. Where both are installed the files are the same,
    and the one installed last wrote them.
    """
    import recbole_llm_kernels

    holders = sorted(set(packages_distributions().get("recbole_llm_kernels", ())))
    return {
        "file": str(recbole_llm_kernels.__file__),
        "version": recbole_llm_kernels.__version__,
        "installed by": ", ".join(f"{name} {version(name)}" for name in holders) or "none, found on the path",
    }


def environment() -> dict[str, Any]:
    """Collect versions, machine, environment variables, kernel backend, repairs and caches, ready for JSON.

    Imports RecBole and so applies the repairs that it reports.
    """
    import recbole.config  # noqa: F401  # the first import of a submodule applies the repairs
    import torch

    from recbole_llm.bridge.repairs.report import repair_report
    from recbole_llm.content.features import FeatureStore
    from recbole_llm_kernels import default_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "executable": os.path.basename(sys.executable),
            "cpu threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "PyTorch's CUDA": torch.version.cuda or "none",
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in VARIABLES or k.startswith(PREFIX)},
        "kernels": {"backend": default_backend(device), **kernels()},
        "repairs": {r.name: f"{r.state}: {r.reason}" for r in repair_report()},
        "caches": {"features": FeatureStore().describe()},
    }


def render(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the report as aligned text, one section a paragraph."""
    blocks = []
    for title, entries in report.items():
        width = max(map(len, entries), default=0)
        blocks.append("\n".join([title, *(f"  {key:{width}}  {value}" for key, value in entries.items())]))
    return "\n\n".join(blocks)
