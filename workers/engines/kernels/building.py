"""Builds the kernel for this machine's processor, once, and keeps it beside the models.

What is built depends on the source, the flags and the processor; it is looked for under a name made
of these, so that a folder shared by different machines holds one file for each kind.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

from config.settings import Models

#: Instruction sets the kernel knows, the best first: what /proc/cpuinfo must list, and g++'s flags.
ISAS: dict[str, tuple[str, ...]] = {
    "avx512bf16": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
}
#: OpenMP is not linked: its functions must be those torch has loaded, or two pools of threads
#: would fight for the processors.
_COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-w"]
_COMPILE += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno"]
_BUILD_S = 120.0


class KernelError(Exception):
    """The kernel can't be had here; the message is one line that says why."""


def isa() -> str:
    """The best instruction set of this processor that the kernel knows; empty when none is."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return next((name for name, needed in ISAS.items() if flags.issuperset(needed)), "")


def compiler() -> str:
    """Path of the C++ compiler: `$CXX`, or g++ or clang++; empty when there is none."""
    named = os.environ.get("CXX", "")
    found = (shutil.which(each) for each in ([named] if named else ["g++", "clang++"]))
    return next(filter(None, found), "")


def built(models: Models, which: str) -> Path:
    """The library for an instruction set, made now if it isn't there.

    Raises `KernelError` without a compiler, when it fails, or where the folder is another user's.
    """
    source = resources.files("workers.engines.kernels") / "paged.cpp"
    flags = [*_COMPILE, *(f"-m{flag.replace('_', '')}" for flag in ISAS[which])]
    identity = source.read_text() + " ".join(flags)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = _folder(models)
    library = folder / f"paged-{which}-{digest}.so"
    try:
        if not library.exists():
            _compile(source.read_text(), flags, folder, library)
        _check(folder)
        _check(library)
    except OSError as error:
        raise KernelError(f"{folder} can't be used: {error.strerror}") from None
    return library


def _folder(models: Models) -> Path:
    root = Path(models.cache_dir) if models.cache_dir else Path("~/.cache/forebay/models")
    return root.expanduser() / ".kernels"


def _compile(source: str, flags: list[str], folder: Path, library: Path) -> None:
    cxx = compiler()
    if not cxx:
        raise KernelError("there is no C++ compiler")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In a folder of its own and moved when it is whole: others may build it at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code, thing, made = (Path(scratch, name) for name in ("k.cpp", "k.o", "k.so"))
            code.write_text(source)
            _run([cxx, *flags, "-c", str(code), "-o", str(thing)])
            _run([cxx, "-shared", str(thing), "-o", str(made)])
            made.chmod(0o500)
            made.rename(library)
    except OSError as error:
        raise KernelError(f"{folder} can't be written: {error.strerror}") from None


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_S)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} took longer than {_BUILD_S:g} s") from None
    except subprocess.CalledProcessError as error:
        words = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise KernelError(f"{command[0]} failed: {words[0][:200]}") from None


def _check(path: Path) -> None:
    """Code is loaded only if nobody else could have put it there."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelError(f"{path} can be written by others")
