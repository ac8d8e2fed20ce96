"""`make audit`: whether a package of this Python's environment has a known vulnerability, by pip-audit.

pip-audit lives in an environment of its own, at one version, so that what is audited is not changed by it. Exit status
0: none is known; 1: some are, listed; 2: the service that knows could not be asked, in one sentence.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = "pip-audit==2.10.1"
HOME = ROOT / "build" / "audit"
TIMEOUT_S = 15
"""For one answer of the service."""


def main() -> int:
    """Make the environment if it is not there, and ask."""
    try:
        tool = _tool()
    except subprocess.CalledProcessError as error:
        print(f"audit: {TOOL} could not be installed: {_last_line(error.stderr)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [str(tool), "--path", sysconfig.get_path("purelib"), "--progress-spinner", "off"]
        command += ["--timeout", str(TIMEOUT_S), "--format", "json", "--output", str(answer)]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if not answer.is_file():
            print(f"audit: the vulnerability service gave no answer: {_last_line(asked.stderr)}", file=sys.stderr)
            return 2
        status, said = verdict(json.loads(answer.read_text())["dependencies"])
        print(f"audit: {said}", file=sys.stderr if status else sys.stdout)
        return status


def verdict(packages: list[dict[str, Any]]) -> tuple[int, str]:
    """Exit status, and what to say of pip-audit's answer. It counts packages that its service does not know as good."""
    known = [package for package in packages if "vulns" in package]
    bad = [package for package in known if package["vulns"]]
    if bad:
        lines = [
            f"  {package['name']} {package['version']}: {', '.join(v['id'] for v in package['vulns'])}"
            f" (mended in {_mended(package) or 'no version'})"
            for package in bad
        ]
        return 1, "\n".join([f"{len(bad)} of {len(known)} packages have known vulnerabilities:", *lines])
    if not known:
        return 2, f"the vulnerability service cannot be reached from here: it knows none of {len(packages)} packages."
    unknown = f"; it does not know {len(packages) - len(known)} others" if len(packages) > len(known) else ""
    return 0, f"the service knows no vulnerability in {len(known)} packages{unknown}."


def _mended(package: dict[str, Any]) -> str:
    return ", ".join(sorted({version for known in package["vulns"] for version in known["fix_versions"]}))


def _tool() -> Path:
    tool, stamp = HOME / "bin" / "pip-audit", HOME / TOOL
    if not stamp.is_file():
        venv.create(HOME, clear=True, with_pip=True)
        install = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", TOOL]
        subprocess.run(install, capture_output=True, text=True, check=True)
        stamp.touch()
    return tool


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
