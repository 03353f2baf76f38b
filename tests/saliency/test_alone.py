"""Someone may want this folder alone: it knows tensors, and nothing of slides or bundles."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import medsd.saliency as package
for module in pkgutil.walk_packages(package.__path__, "medsd.saliency."):
    importlib.import_module(module.name)
print(*sorted(name for name in sys.modules if name.startswith("medsd.") and not name.startswith("medsd.saliency")))
print(*sorted({"monai", "openslide", "tiatoolbox", "tifffile", "timm", "matplotlib", "captum"} & set(sys.modules)))
"""


def test_needs_no_slides_and_no_bundles() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    ours, heavy = result.stdout.splitlines()
    assert set(ours.split()) <= {
        "medsd.checks",
        "medsd.errors",
        "medsd.progress",
        "medsd.networks",
        "medsd.networks.blur",
        "medsd.networks.modes",
        "medsd.networks.symmetry",
        "medsd.networks.tokens",
    }
    assert not heavy
