"""Pages that a process is given anew, counted by the system."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

from medsd.networks.memory import freed_memory_kept

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
# In a process of its own, for what one did before decides where a block comes from.
COUNTED = """
import json, resource
from pathlib import Path
from medsd.networks.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(192 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1])

usual = [faults() for _ in range(3)]
with freed_memory_kept():
    kept = [faults() for _ in range(3)]
    held = resident()
print(json.dumps([usual, kept, held, resident(), [faults() for _ in range(3)]]))
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc, nothing is done")
def test_what_is_freed_is_used_again_and_given_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, check=True, text=True)
    usual, kept, held, after, as_before = json.loads(done.stdout)
    assert min(usual) > 0 and max(kept[1:]) < min(usual) / 4  # the first asks for it
    assert after < held / 2
    assert min(as_before) > min(usual) / 2


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # would be called
    with freed_memory_kept():
        pass
