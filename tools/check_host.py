"""Say in one sentence whether this interpreter on this machine can run the CPU set-up.

Run by `make setup` before anything is installed, so it needs the standard library alone and
starts on any Python. Exit status: 0 fit, 1 the host or the installation lacks something,
2 this Python's version is not supported.
"""

import os
import platform
import sys
import sysconfig

OLDEST = (3, 10)
NEWEST = (3, 12)
GLIBC = (2, 35)  # what the libraries shipped beside tritonserver 2.51 ask for


class HostFacts(object):
    """What the checks look at. Every field can be set by a test."""

    def __init__(self):
        self.python = tuple(sys.version_info[:2])
        self.implementation = platform.python_implementation()
        self.system = platform.system()
        self.machine = platform.machine()
        self.is_64bit = sys.maxsize > 2**32
        self.glibc = read_glibc()
        self.has_venv = can_import("venv") and can_import("ensurepip")
        self.libpython = find_libpython()
        self.has_apt = any(os.path.exists(path) for path in ("/usr/bin/apt-get", "/bin/apt-get"))
        self.is_distro_python = sys.prefix == "/usr" or getattr(sys, "base_prefix", "") == "/usr"


def can_import(name):
    """Return whether a module of the standard library is really there (Debian splits some off)."""
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def read_glibc():
    """Return glibc's version as (major, minor), or None where the C library is another one."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else None
    except (AttributeError, OSError, ValueError):
        return None


def find_libpython():
    """Return the path of libpython3.X.so.1.0, which Triton's stub loads, or None."""
    name = "libpython{0}.{1}.so.1.0".format(*sys.version_info[:2])
    base = getattr(sys, "base_prefix", sys.prefix)
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    folders = [sysconfig.get_config_var("LIBDIR"), os.path.join(base, "lib"), os.path.join(base, "lib", multiarch)]
    for folder in folders:
        if folder and os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    return None


def check_version(facts):
    """Return what is wrong with the interpreter's version, or None."""
    dotted = "{0}.{1}".format(*facts.python)
    remedy = "install Python 3.11 and run make PYTHON=python3.11"
    if facts.implementation != "CPython":
        return "{0} cannot be embedded by Triton's Python stub, which needs CPython: {1}".format(
            facts.implementation, remedy
        )
    if facts.python > NEWEST:
        return "Python {0} is not supported by Triton 2.51's stub (NumPy < 2 has no wheel for it): {1}".format(
            dotted, remedy
        )
    if facts.python < OLDEST:
        return "Python {0} is too old, 3.10 to 3.12 are supported: {1}".format(dotted, remedy)
    return None


def check_host(facts):
    """Return what the machine or the interpreter's installation lacks, or None."""
    python = "python{0}.{1}".format(*facts.python)
    if facts.system != "Linux" or facts.machine not in ("x86_64", "AMD64") or not facts.is_64bit:
        return (
            "tritonserver's wheel is for 64-bit Linux on x86-64 and this is {0} on {1}: "
            "use such a machine, a virtual one or a container for linux/amd64".format(facts.system, facts.machine)
        )
    if facts.glibc is None or facts.glibc < GLIBC:
        found = "another C library" if facts.glibc is None else "{0}.{1}".format(*facts.glibc)
        return (
            "tritonserver needs glibc 2.35 or newer and this system has {0}: "
            "use Debian 12, Ubuntu 22.04 or newer, or a container of one".format(found)
        )
    if not facts.has_venv:
        return "{0} lacks the venv module: {1}".format(
            python, "run apt-get install {0}-venv as root".format(python) if facts.has_apt else "install it in full"
        )
    if facts.libpython is None:
        return "Triton's stub needs lib{0}.so.1.0, which does not come with this {0}: {1}".format(
            python,
            "run apt-get install lib{0} as root".format(python)
            if facts.has_apt and facts.is_distro_python
            else "use one that was built with --enable-shared",
        )
    return None


def main():
    """Check this interpreter; print the one sentence that says what stands in the way."""
    facts = HostFacts()
    for check, status in ((check_version, 2), (check_host, 1)):
        problem = check(facts)
        if problem:
            sys.stderr.write(problem + "\n")
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
