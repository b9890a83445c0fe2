"""transformers' own from_pretrained on tqformat repositories; `import tqformat.hf` is all it takes.

    import tqformat.hf
    model = AutoModelForCausalLM.from_pretrained("repo_dir_or_owner/name", device_map="auto")

The model is packed; with quantization_config=TQFormatConfig(dequantize=True) it is the plain, decoded one. Configuration and
quantizer are registered where transformers wants them. What transformers has no place for are weights in files of another
name: it resolves file names before a quantizer may speak, and without its own names it finds none. So from_pretrained hands a
tqformat repository to `load` below, and everything else to transformers, unchanged. Without this module such a call ends with
transformers' error that there is no model.safetensors.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import hub
from . import load_quantized as lq
from .load_quantized import LazyWeight, Repo, require
from .packed import PackedRepo, finish

METHOD = "tqformat"
HUB = ("cache_dir", "force_download", "local_files_only", "token", "subfolder", "proxies", "variant", "use_safetensors")


@register_quantization_config(METHOD)
class TQFormatConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json of a repository says of its quantization: the manifest says the rest.

    With `dequantize` from_pretrained gives the decoded model, which takes the memory of its base.
    """

    def __init__(self, dequantize: bool = False, **_: Any) -> None:
        self.quant_method, self.dequantize = METHOD, dequantize


@register_quantizer(METHOD)
class TQFormatQuantizer(HfQuantizer):  # type: ignore[misc]
    """Tells transformers that the model is quantized; its weights are already what they should be when they come."""

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        return dtype  # of decoded values, for every weight

    def is_serializable(self, **_: Any) -> bool:
        return True  # by the save_pretrained that the model gets

    @property
    def is_trainable(self) -> bool:
        return True  # an adapter on top of it


class _Lazy(LazyWeight):
    def is_floating_point(self) -> bool:  # early releases of transformers 5 ask
        return bool(self.dtype.is_floating_point)


def is_ours(name: Any, config: Any, options: dict[str, Any]) -> bool:
    """Whether `name` is a tqformat repository, as its configuration says."""
    if isinstance(config, PreTrainedConfig):
        found = getattr(config, "quantization_config", None)
    elif (path := Path(name if config is None else config)).exists() and not (path / "config.json").is_file():
        return False
    else:
        hub = {key: options[key] for key in (*HUB[:5], "revision") if key in options}
        try:
            found = PreTrainedConfig.get_config_dict(name if config is None else config, **hub)[0]
        except OSError:  # none there, as beside a file of GGUF; if anything else is wrong, transformers will say it
            return False
        found = found.get("quantization_config")
    return (found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)) == METHOD


def load(
    cls: Any,
    name: "lq.PathLike",
    *args: Any,
    config: Any = None,
    revision: str | None = None,
    device_map: Any = None,
    dtype: Any = "auto",
    quantization_config: Any = None,
    trust_remote_code: bool | None = None,
    generation_config: Any = None,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """cls.from_pretrained of the tqformat repository `name`; the arguments are transformers'.

    Raises TQFormatError BIND.MODEL, before any weight is read, where the names or shapes of weights are not the model's.
    """
    chosen = quantization_config or {}
    chosen = TQFormatConfig(**chosen) if isinstance(chosen, dict) else chosen
    ok = isinstance(chosen, TQFormatConfig)
    require(ok, "SCHEMA.AMBIGUOUS", "quantization_config", "a TQFormatConfig", type(chosen).__name__)
    given = [key for key in HUB if options.get(key) not in (None, False, "")]
    parts = ", ".join(key for key in given if key in ("subfolder", "variant"))
    require(
        not parts, "SCHEMA.UNKNOWN_FIELD", parts, "the path or id of one repository, which has no parts or variants"
    )
    if not Path(name).is_dir():
        advice = "settings of the Hub from its environment (HF_TOKEN, HF_HOME)"
        require(not given, "SCHEMA.UNKNOWN_FIELD", ", ".join(given), advice)
    adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
    require(
        adapter is None, "SCHEMA.UNKNOWN_FIELD", str(adapter), "the model's own path; then model.load_adapter(path)"
    )
    dropped = {*HUB, "adapter_kwargs", "weights_only"}  # of which nothing is left to do
    options = {key: value for key, value in options.items() if key not in dropped and not key.startswith("_from")}
    dtype = options.pop("torch_dtype", None) or dtype
    experts = options.get("experts_implementation") or getattr(config, "_experts_implementation", None)
    path = hub.fetch(name, revision, bool(trust_remote_code))
    with Repo(path, beside=True) if chosen.dequantize else PackedRepo(path) as repo:
        repo.check_roles("support", *["code"] * bool(trust_remote_code))
        if not isinstance(config, PreTrainedConfig):  # or the path of one
            source = repo.path if config is None else config
            config, options = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **options)
        config = copy.deepcopy(config)
        del config.quantization_config
        if dtype in (None, "auto"):
            dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
        names = repo.names()

        def place(device_map: Any) -> Any:
            weights = {name: _Lazy(repo, name) for name in names}
            own = {"config": config, "state_dict": weights, "dtype": dtype, "device_map": device_map}
            own |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            return _plain(cls, None, *args, **own, **options)

        def fits() -> bool:
            with suppress(Exception), torch.device("meta"):  # what cannot be built so
                return not args and lq.fits_model(repo.manifest, cls._from_config(copy.deepcopy(config)))
            return False

        last = {"": "cpu"} if device_map is None else device_map
        with lq._building, _quiet():  # unless names and shapes are the model's, first on the meta device and without a
            for places in [last] if fits() else [{"": "meta"}, last]:  # quantizer, for one may switch comparisons off
                if places is last and not chosen.dequantize:
                    config.quantization_config = {"quant_method": METHOD}
                model, info = place(places)
                if needed := [alias for alias in repo.manifest.tied_weights if alias in info["missing_keys"]]:
                    names += needed
                    model, info = place(places)
                for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
                    found = ", ".join(sorted(map(str, info[key])))
                    require(not found, "BIND.MODEL", cls.__name__, f"no {key.replace('_', ' ')}", found)
        if isinstance(repo, PackedRepo):
            finish(model, repo, experts)
    if model.can_generate():
        if generation_config is None and "generation_config.json" in repo.manifest.files:
            generation_config = GenerationConfig.from_pretrained(repo.path, local_files_only=True)
        model.generation_config = generation_config or model.generation_config
    model.name_or_path = model.config.name_or_path = str(name)
    return (model, info) if output_loading_info else model


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


_plain: Any = PreTrainedModel.from_pretrained.__func__


@functools.wraps(_plain)
def from_pretrained(
    cls: Any, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **options: Any
) -> Any:
    name = pretrained_model_name_or_path
    if name is not None and options.get("state_dict") is None and is_ours(name, config, options):
        return load(cls, name, *args, config=config, **options)
    return _plain(cls, name, *args, config=config, **options)


_method: Any = from_pretrained
PreTrainedModel.from_pretrained = classmethod(_method)
