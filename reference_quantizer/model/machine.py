"""The machine under a model: devices, the cache directory and its locks, and what figures depend on."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from reference_quantizer import __version__
from tqformat.load_quantized import TQFormatError
from tqformat.load_quantized import __version__ as tqformat_version

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def check_device(device: str) -> None:
    """UNSUPPORTED.DEVICE unless tensors can be made on `device`."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TQFormatError("UNSUPPORTED.DEVICE", f"--device {device}", reason) from None


def has_bfloat16(device: str) -> bool:
    """Whether `device` has instructions for products of bfloat16 matrices, about twice as fast as float32."""
    if device == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.startswith("cuda")


def free_memory() -> int:
    """Bytes that a program can have without making the system swap."""
    import psutil  # comes with accelerate

    return int(psutil.virtual_memory().available)


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees for its next arrays, where the C library is glibc.

    By default large arrays go back to the system each time, which zeroes their pages when they come again: a third of the time of
    tuning a model of many tokens. The peak of memory grows by about a tenth.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never, by mallopt(3)
        mallopt(M_MMAP_MAX, 0)


def default_cache() -> Path:
    """Where results are kept if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqformat"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One run at a time: two would write their results into one file."""
    with open(path, "ab") as file:
        try:
            import fcntl
        except ImportError:  # not on this system
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another run is writing what this one needs; wait until it is done"
            raise TQFormatError("PATH.COLLISION", path.name, message) from None
        yield


def hardware(device: str) -> dict[str, str]:
    """The machine, in words."""
    if device.startswith("cuda"):
        return {"device": "cuda", "description": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M)):
        name = found[1].strip()
    threads = torch.get_num_threads()
    return {"device": "cpu", "description": f"{name}, {threads} thread{'s' if threads > 1 else ''}"}


def libraries() -> dict[str, str]:
    """The versions that the figures depend on."""
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "tqformat": tqformat_version,
        "reference_quantizer": __version__,
    }
