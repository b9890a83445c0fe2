"""Libraries that not every command needs: where one is missing, it is told at once and in one way. Needs no torch."""

import importlib.util
import sys

from tqformat.load_quantized import TQFormatError

EXTRAS = {  # extra of tqformat -> the modules that it brings and that are imported only when they are needed
    "models": ("transformers", "accelerate", "huggingface_hub"),
    "quantizer": ("rich", "tqdm", "jinja2", "matplotlib", "yaml", "pyarrow"),
    "encoders": ("numba",),
    "conformance": ("jsonschema",),
    "gguf": ("gguf",),
    "tasks": ("lm_eval",),
}
PACKAGES = {"yaml": "pyyaml", "lm_eval": "lm-eval"}  # whose name is not the module's


def need(where: str, *modules: str) -> None:
    """UNSUPPORTED.LIBRARY if one of the modules is not installed; `where` is what needs them."""
    if missing := [name for name in modules if not is_installed(name)]:
        raise missing_library(where, *missing)


def is_installed(module: str) -> bool:
    """Whether the module is there to be imported; it is not imported."""
    return sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None


def missing_library(where: str, *modules: str) -> TQFormatError:
    """The error for modules that cannot be imported: their packages, and the extra that brings each."""
    extra_of = {module: extra for extra, known in EXTRAS.items() for module in known}
    reasons = [
        f"{PACKAGES.get(name, name)} cannot be imported; it comes with the extra `{extra_of[name]}` of tqformat"
        for name in modules
    ]
    return TQFormatError("UNSUPPORTED.LIBRARY", where, "; ".join(reasons))


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the Hub, or the way there, is at fault."""
    from huggingface_hub.errors import HfHubHTTPError

    # its HTTP library, whichever that is, has errors of its own, of which the first base of this one is the root
    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def reason(error: BaseException) -> str:
    """An error of huggingface_hub on one line: its last cause, which is the plain one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
