"""`versions()`: what a report of a fault begins with."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import optree
import pytest
import torch
import transformers

import nicehooks
from nicehooks import installed, versions


def test_versions_are_those_of_the_packages_that_run():
    said = versions()
    assert list(said) == ["python", "platform", "nicehooks", "torch", "optree", "transformers", "safetensors", "numpy"]
    assert said["python"] == sys.version.split()[0]
    assert (said["nicehooks"], said["torch"]) == (nicehooks.__version__, torch.__version__)
    assert (said["optree"], said["transformers"]) == (optree.__version__, transformers.__version__)


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def version(package: str) -> str:
        if package == "transformers":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(installed, "version", version)
    assert list(versions()) == ["python", "platform", "nicehooks", "torch", "optree", "safetensors", "numpy"]


def test_the_templates_of_reports_ask_for_them():
    root = Path(__file__).parent.parent.parent
    (code,) = re.findall(r'python -c "([^"]*)"', (root / ".github" / "ISSUE_TEMPLATE" / "fault.yml").read_text())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{versions()}\n"
