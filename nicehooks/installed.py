"""Which versions are installed: what a report of a fault begins with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("nicehooks", "torch", "optree", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of nicehooks and of what it works with, for a report of a fault.

    >>> from nicehooks import versions
    >>> list(versions())[:5]
    ['python', 'platform', 'nicehooks', 'torch', 'optree']

    Returns:
        A version by the name of each package; packages that are not installed are left out.
    """
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "torch" in found:
        found["torch"] = torch.__version__  # which build it is, and that is not always in its metadata
    return found
