"""Resolve the CPU set-up for every supported Python and write constraints/cpu.txt.

    pip install uv && python tools/lock_constraints.py

uv reads metadata alone: nothing is downloaded or installed, and one Python serves for all.
Pins that differ between the Pythons get an environment marker. CUDA's own packages are left
out, for PyTorch's CUDA wheel pins those itself and its CPU wheel has none.
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints" / "cpu.txt"
PYTHONS = ("3.10", "3.11", "3.12")
EXTRAS = ("server", "embedded", "openai-server", "plots", "dev")
FIXED = ("torch==2.13.0", "numpy==1.26.4")
LEFT_OUT = ("cuda-", "nvidia-cu", "nvidia-nccl", "nvidia-nv")
HEADER = """\
# The CPU set-up, pinned for Python 3.10, 3.11 and 3.12 on Linux x86-64.
# Written by tools/lock_constraints.py: change pyproject.toml and run that, do not edit.
# torch==2.13.0 takes the CPU build (2.13.0+cpu) where an index offers it: see CONTRIBUTING.md.
"""


def resolve(python: str) -> list[str]:
    """Return the pins, `name==version`, that uv chooses for one Python on Linux x86-64."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--constraints", "-"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
    command += [part for extra in EXTRAS for part in ("--extra", extra)]
    done = subprocess.run(
        [*command, "pyproject.toml"], input="\n".join(FIXED), cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
    )
    return [line for line in done.stdout.splitlines() if line and not line.startswith(LEFT_OUT)]


def marker(pythons: list[str]) -> str:
    """Return the environment marker for a pin that these Pythons share, empty if all do."""
    if pythons == list(PYTHONS):
        return ""
    if len(pythons) > 1 and pythons[-1] == PYTHONS[-1]:
        return f' ; python_version >= "{pythons[0]}"'
    return " ; " + " or ".join(f'python_version == "{python}"' for python in pythons)


def merge(resolved: dict[str, list[str]]) -> list[str]:
    """Return the file's lines: a pin that not every Python shares names the Pythons it is for."""
    pythons_of: dict[str, list[str]] = defaultdict(list)
    for python, pins in resolved.items():
        for pin in pins:
            pythons_of[pin].append(python)
    in_order = sorted(pythons_of.items(), key=lambda item: (item[0].split("==")[0], item[1]))
    return [pin + marker(pythons) for pin, pythons in in_order]


def main() -> int:
    """Resolve for every Python and write the file."""
    lines = merge({python: resolve(python) for python in PYTHONS})
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{TARGET.relative_to(ROOT)}: {len(lines)} pins for Python {', '.join(PYTHONS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
