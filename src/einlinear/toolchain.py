"""The C++ of this package, compiled once on each machine by the compiler that is there; where none is, it goes without.

torch, Triton and `torch.compile` build parts of themselves so. What is built is kept in the user's cache
(`$XDG_CACHE_HOME/einlinear`), named by everything that it was made of. `EINLINEAR_NATIVE=0` turns this off.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).parent / "kernels" / "native.cpp"
"""What is compiled; it includes the headers beside it."""

OPTIONS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
)


@lru_cache
def compiler() -> str | None:
    """The path of a C++ compiler."""
    if os.name != "posix" or os.environ.get("EINLINEAR_NATIVE", "1") == "0":
        return None
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def refusal() -> str | None:
    """Why there is no compiled code, or None."""
    if os.environ.get("EINLINEAR_NATIVE", "1") == "0":
        return "EINLINEAR_NATIVE=0 turns compiled code off"
    return None if compiler() else "no C++ compiler was found; install g++ or clang++, or name one by CXX"


@lru_cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None, with a warning, where it could not be had."""
    found = compiler()
    if found is None:
        return None
    try:
        return _declared(_loaded(found, _threads()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"compiled code cannot be had, slower ways run instead: {found} on {SOURCE} said: {str(said)[-500:]}; "
            f"name another compiler by CXX, or set EINLINEAR_NATIVE=0",
            stacklevel=2,
        )
        return None


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """Its functions with the types of what they take."""
    number, address, packed = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    for mode in ("forward", "backward"):
        size = getattr(found, f"einlinear_{mode}_memory")
        size.argtypes, size.restype = (number, packed, number, number, packed), number
    found.einlinear_plan.argtypes, found.einlinear_plan.restype = (number, packed, packed), number
    for kind in ("float32", "bfloat16", "float16"):
        forward, backward = (getattr(found, f"einlinear_{mode}_{kind}") for mode in ("forward", "backward"))
        forward.argtypes = (number, packed, packed, address, number, address, address, *2 * (number,), address, packed)
        others = packed, *2 * (number,), address, packed
        backward.argtypes = (number, *2 * (packed,), *2 * (address, number), address, *others)
        forward.restype = backward.restype = None
    return found


def _threads() -> bool:
    """Whether the threads that torch has can be used: those of GNU's OpenMP, made known to what is loaded after it."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line}
    except OSError:
        return False
    for path in loaded:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    return len(loaded) == 1


def _loaded(compiler: str, threads: bool) -> ctypes.CDLL:
    """The compiled code, which is made where it is not kept from before, and kept where there is a place for it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    options = (*OPTIONS, *(("-fopenmp",) if threads and "clang" not in version else ()))  # clang's threads are others
    sources = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
    made_of = (*(source.read_text() for source in sources), *options, compiler, version, processor())
    name = f"native-{hashlib.sha256('|'.join(made_of).encode()).hexdigest()[:32]}.so"
    home = _own(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "einlinear")
    if home is not None and _trusted(home / name):
        return ctypes.CDLL(str(home / name))
    with tempfile.TemporaryDirectory(prefix="einlinear-") as folder:
        # Linked without -fopenmp: it is torch's threads that are meant, not another set of them.
        compiled, linked = Path(folder) / "native.o", Path(folder) / name
        for step in ([*options, "-c", str(SOURCE), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(linked)]):
            subprocess.run([compiler, *step], capture_output=True, text=True, check=True, timeout=300)
        if home is not None:
            fresh = (home / name).with_suffix(f".{os.getpid()}")
            with suppress(OSError):  # as where the disk is full
                shutil.copy(linked, fresh)
                fresh.chmod(0o700)
                fresh.replace(home / name)  # whole or not at all, if other processes do the same
        return ctypes.CDLL(str(linked))  # which stays in memory


def _own(folder: Path) -> Path | None:
    """A folder that nobody else can write to, made if need be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if _trusted(folder) else None


def _trusted(path: Path) -> bool:
    """Whether it is there, is this user's, and nobody else can write to it: what is loaded from it will be run."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(path, os.R_OK | os.W_OK)


@lru_cache
def processor() -> str:
    """What `-march=native` goes by, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return "".join(
                sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))})
            )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
