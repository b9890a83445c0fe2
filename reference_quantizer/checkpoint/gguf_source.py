"""A GGUF file as a source: it becomes a plain bf16 checkpoint, which is then quantized like any other.

transformers maps names and layouts, and gguf decodes the blocks. Because transformers only warns, or says nothing, where a file
and a model class do not fit, the result is checked: no weight missing, the same number of scalars on both sides, and a sample
of matrices equal to what gguf's own decoder gives. `gguf_import.json` in the checkpoint says where it comes from.

Memory: the bf16 model, and for one tensor at a time several float32 copies of it. In practice the largest tensor, the embedding,
decides: see the peak that `import-gguf` prints.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import PROVENANCE, Info, Source, open_source, read_json
from reference_quantizer.disk import writing
from reference_quantizer.libraries import need
from reference_quantizer.progress import tell
from tqformat.load_quantized import TQFormatError

MAGIC = b"GGUF"
PACKAGE = "package:"
PLAIN = {"F32", "F16", "BF16", "F64"}  # tensor types that are not quantized
ROPE_TABLES = ("rope_freqs", "rope_factors")  # derived tables, which the model classes compute from their configuration
SIMPLE = r"token_embd|output|blk\.\d+\.(ffn_up|ffn_gate|ffn_down|attn_v)"  # tensors that are mapped by name alone,
RESHAPED = {"gpt2", "bloom"}  # except in these architectures
SAMPLES = 8  # tensors that are compared with gguf's decoder


def is_gguf(src: str) -> bool:
    """Whether `src` is for this module: a GGUF file, a directory of GGUF files alone, or package:NAME."""
    path = Path(src)
    if path.is_dir():  # whatever its name: imported checkpoints are kept in a directory .<name>.gguf
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    if src.startswith(PACKAGE) or path.suffix.lower() == ".gguf":
        return True
    return path.is_file() and _magic(path) == MAGIC


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def find_file(src: str, work: Path) -> Path:
    """The GGUF file that `src` means; a package that holds it in parts joins them in `work`."""
    path = _packaged(src.removeprefix(PACKAGE), work) if src.startswith(PACKAGE) else Path(src)
    if path.is_dir():
        files = sorted(p for p in path.glob("*.gguf") if not p.name.startswith("mmproj"))
        if len(files) != 1:
            names = ", ".join(p.name for p in files[:4]) or "none but projectors"
            raise TQFormatError("SCHEMA.AMBIGUOUS", src, f"expected one GGUF file, found {names}; name one")
        path = files[0]
    if not path.is_file():
        raise TQFormatError("BIND.MISSING_FILE", src, "there is no such GGUF file")
    if _magic(path) != MAGIC:
        raise TQFormatError("CONTAINER.HEADER", path.name, "not a GGUF file: it does not begin with the bytes GGUF")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        advice = "the file is one part of several; join them with `llama-gguf-split --merge`"
        raise TQFormatError("BIND.SHARDS", path.name, advice)
    return path


def _packaged(name: str, work: Path) -> Path:
    """The GGUF file in an installed Python package, or what the package's assemble() makes of its parts."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        advice = f"the package is not installed: pip install {name}"
        raise TQFormatError("UNSUPPORTED.LIBRARY", PACKAGE + name, advice) from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) == 1:
        return found[0]
    try:
        module = importlib.import_module(re.sub(r"[-.]+", "_", name))
        target = work / module.MODEL_NAME
        work.mkdir(parents=True, exist_ok=True)
        module.assemble(target)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        message = f"expected one GGUF file or an assemble() in the package, found {len(found)}: {error}"
        raise TQFormatError("BIND.MISSING_FILE", PACKAGE + name, message) from None
    return Path(target)


# ------------------------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """gguf's reader of the file, which transformers gets, too, while the context lasts.

    Reading the vocabulary takes gguf seconds, and transformers would do it five times.
    """
    need(file.name, "gguf", "accelerate", "transformers")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        message = f"gguf cannot read the file, it is damaged or incomplete: {str(error)[:200]}"
        raise TQFormatError("CONTAINER.HEADER", file.name, message) from None
    count = field(reader, "split.count")
    if isinstance(count, int) and count > 1:
        raise TQFormatError("BIND.SHARDS", file.name, f"the file is one part of {count}; join them first")

    def again(path: Any, *args: Any, **kwargs: Any) -> Any:
        return reader if Path(path).resolve() == file.resolve() else original(path, *args, **kwargs)

    original = gguf.GGUFReader
    gguf.GGUFReader = again
    try:
        yield reader
    finally:
        gguf.GGUFReader = original


def field(reader: Any, key: str) -> Any:
    """The value of a key of the file's metadata; None without it."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def provenance(file: Path, reader: Any) -> dict[str, Any]:
    """What a manifest says about the file: name, size, digest, architecture, and how its tensors were quantized."""
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    facts: dict[str, Any] = {"format": "gguf", "file": file.name, "size": file.stat().st_size}
    facts |= {"sha256": digest.hexdigest(), "architecture": field(reader, "general.architecture")}
    facts["tensor_types"] = dict(sorted(Counter(t.tensor_type.name for t in reader.tensors).items()))
    facts["quantized"] = not set(facts["tensor_types"]) <= PLAIN
    if tables := [t.name for t in reader.tensors if t.name.startswith(ROPE_TABLES)]:
        facts["left_out"] = tables
    for key in ("name", "license"):
        if isinstance(value := field(reader, f"general.{key}"), str):
            facts[key] = value
    return facts


def read_config(file: Path, reader: Any) -> Any:
    """The model's configuration, as transformers reads it from the file."""
    import transformers

    architecture = field(reader, "general.architecture")
    try:
        packed = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = f"transformers {transformers.__version__} does not read the architecture {architecture!r} from GGUF"
        raise TQFormatError("UNSUPPORTED.LIBRARY", file.name, f"{reason}: {str(error)[:200]}") from None
    plain = packed.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        plain.pop(key, None)
    return type(packed).from_dict(_shortest(plain))


def _shortest(value: Any) -> Any:
    """Real numbers in the shortest form that is the same in float32, which is all that GGUF keeps: 1e-05."""
    import numpy as np

    if isinstance(value, dict):
        return {k: _shortest(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortest(v) for v in value]
    return float(str(np.float32(value))) if isinstance(value, float) and math.isfinite(value) else value


def _model_class(config: Any) -> Any:
    import transformers

    names = [n for n in config.architectures or [] if hasattr(transformers, n)]  # given for some encoders
    if names:
        return getattr(transformers, names[0])
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return auto._model_mapping[type(config)]


def empty_model(config: Any, dtype: str = "bfloat16") -> Any:
    """The model without memory for its weights."""
    import torch

    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=getattr(torch, dtype))


def plan_source(src: str) -> Source:
    """The tensors that an import would write, for a plan: nothing is decoded."""
    with tempfile.TemporaryDirectory() as work:
        file = find_file(src, Path(work))
        with opened(file) as reader:
            config = read_config(file, reader)
            model = empty_model(config)
            facts = provenance(file, reader)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {n: Info(n, tuple(t.shape), "BF16") for n, t in sorted(model.state_dict().items()) if n not in tied}
    return Source(file, tensors, config=config.to_dict(), notes=describe_import(facts), provenance=facts)


def describe_import(facts: dict[str, Any]) -> tuple[str, ...]:
    """What a user should know of a GGUF file that is read, a line each."""
    kinds = ", ".join(f"{name} {count}" for name, count in facts["tensor_types"].items())
    notes = [f"{facts['file']} ({kinds}) is read as bf16"]
    if facts["quantized"]:
        advice = "the errors of both methods add up, so start from the original checkpoint where you can"
        notes = [f"{facts['file']} is already quantized ({kinds}); {advice}"]
    return (*notes, *describe_left_out(facts))


def describe_left_out(facts: dict[str, Any]) -> tuple[str, ...]:
    """What a user should know of tensors that are not taken, a line or none."""
    if names := facts.get("left_out"):
        return (f"left out: {', '.join(names)}; see that config.json has the rope scaling of the original model",)
    return ()


# ------------------------------------------------------------------------------------------------ importing


def import_gguf(src: str, out: Path, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Write the plain bf16 checkpoint of a GGUF file to the directory `out`, all or nothing; returns its provenance.

    `quiet` leaves out the progress bars of transformers.
    """
    if out.exists() and not overwrite:
        raise TQFormatError("PATH.COLLISION", str(out), "the target exists; pass --overwrite to replace it")
    built = out.with_name(f".{out.name}.new")
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    try:
        with writing(built), tempfile.TemporaryDirectory(dir=built.parent, prefix=f".{out.name}.") as work:
            file = find_file(src, Path(work))
            with opened(file) as reader:
                facts = provenance(file, reader)
                with (
                    contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
                ):  # bars of two kinds
                    _write(file, reader, built)
                _check(built, file, reader)
        (built / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        if out.exists():
            shutil.rmtree(out)
        built.rename(out)
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return facts


def _write(file: Path, reader: Any, out: Path) -> None:
    """The model, its configuration and its tokenizer, as transformers saves them."""
    import torch
    import transformers

    config = read_config(file, reader)
    types = ", ".join(sorted({t.tensor_type.name for t in reader.tensors}))
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        options = {"gguf_file": file.name, "dtype": torch.bfloat16, "output_loading_info": True}
        packed, info = _model_class(config).from_pretrained(file.parent, **options)
        faults = {key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "mismatched_keys")}
        for key, names in faults.items():
            if names:
                raise TQFormatError("BIND.MODEL", file.name, f"{key.replace('_', ' ')}: {', '.join(names[:4])[:300]}")
        model = empty_model(config)
        model.load_state_dict(packed.state_dict(), assign=True)
        model.tie_weights()
        if packed.generation_config is not None:
            model.generation_config = packed.generation_config
        model.save_pretrained(out)
        read_tokenizer(file).save_pretrained(out)
    except TQFormatError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = f"transformers {transformers.__version__} cannot read this file (tensor types {types})"
        raise TQFormatError("UNSUPPORTED.LIBRARY", file.name, f"{reason}: {str(error)[:300]}") from None
    finally:
        transformers.utils.logging.set_verbosity(before)


def read_tokenizer(file: Path) -> Any:
    """The tokenizer that transformers builds from the file's vocabulary."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # tokenizers raises nothing narrower for a vocabulary that it refuses
        message = f"transformers cannot build the tokenizer: {str(error)[:300]}"
        raise TQFormatError("UNSUPPORTED.LIBRARY", file.name, message) from None


def _check(checkpoint: Path, file: Path, reader: Any) -> None:
    """Compare the checkpoint with the file: as many scalars, and a sample of tensors as gguf's own decoder has them."""
    import gguf
    import torch
    from safetensors import safe_open

    source = open_source(str(checkpoint))
    tied = (source.config or {}).get("tie_word_embeddings", False)
    tensors = [t for t in reader.tensors if not t.name.startswith(ROPE_TABLES)]
    tensors = [t for t in tensors if not (tied and t.name == "output.weight")]
    here, there = sum(i.scalars for i in source.tensors.values()), sum(int(t.n_elements) for t in tensors)
    if here != there:
        message = f"the file holds {there:,} scalars and the model class {here:,}: they do not fit"
        raise TQFormatError("BIND.MODEL", file.name, message)

    architecture = field(reader, "general.architecture")
    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None or architecture in RESHAPED:
        return
    names = gguf.get_tensor_name_map(arch, int((source.config or {}).get("num_hidden_layers") or 0))
    mapped = {}
    for name in source.tensors:
        stored = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if re.fullmatch(rf"({SIMPLE})\.weight", stored):
            mapped[stored] = name
    common = [t for t in tensors if t.name in mapped]
    for tensor in common[:: max(1, -(-len(common) // SAMPLES))]:
        info = source.tensors[mapped[tensor.name]]
        with safe_open(checkpoint / info.file, "pt") as data:
            saved = data.get_tensor(info.name)
        step = max(1, 2**20 // info.cols)  # rows
        wanted = (gguf.dequantize(tensor.data[i : i + step], tensor.tensor_type) for i in range(0, info.rows, step))
        for i, rows in enumerate(wanted):
            if not torch.equal(saved[i * step : (i + 1) * step], torch.tensor(rows).to(saved.dtype)):
                message = f"differs from what gguf decodes for {tensor.name}"
                raise TQFormatError("BIND.TENSOR", f"{file.name}: {info.name}", message)


# ------------------------------------------------------------------------------------------------ work directory


def work_checkpoint(out: Path) -> Path:
    """Where `quantize` keeps the imported checkpoint until the release `out` is finished."""
    return out.absolute().with_name(f".{out.name}.gguf")


def prepared(src: str, out: Path, quiet: bool = False) -> Source:
    """The source to quantize for a GGUF `src`: imported beside `out`, or found there from an interrupted run."""
    source = _imported(src, work_checkpoint(out), ", kept until the release is finished", quiet)
    for note in describe_import(source.provenance or {}):
        tell(f"note: {note}")
    return source


def cached(src: str, cache: Path, quiet: bool = False) -> Source:
    """The checkpoint of a GGUF `src`, imported into the directory `cache`, or found there from an earlier run."""
    name = hashlib.sha256(json.dumps(identity(src)).encode()).hexdigest()[:32]
    return _imported(src, cache / f"gguf-{name}", "", quiet)


def _imported(src: str, checkpoint: Path, how_long: str, quiet: bool) -> Source:
    """The checkpoint of `src` in the directory `checkpoint`, imported unless it is there."""
    job, record = identity(src), checkpoint / ".job.json"
    if record.is_file() and read_json(record) == job:
        tell(f"going on with the checkpoint that an earlier run imported to {checkpoint}")
    else:
        tell(f"importing {src} to {checkpoint}{how_long}")
        import_gguf(src, checkpoint, overwrite=True, quiet=quiet)
        record.write_text(json.dumps(job), "utf-8")
    return open_source(str(checkpoint))


def identity(src: str) -> dict[str, Any]:
    """What tells a GGUF `src` from a changed one, without reading it: place, size and time, or a package's version."""
    if src.startswith(PACKAGE):
        try:
            return {"source": src, "version": importlib.metadata.version(src.removeprefix(PACKAGE))}
        except importlib.metadata.PackageNotFoundError:
            advice = f"the package is not installed: pip install {src.removeprefix(PACKAGE)}"
            raise TQFormatError("UNSUPPORTED.LIBRARY", src, advice) from None
    file = find_file(src, Path()).resolve()  # nothing is joined: it is no package
    return {"source": str(file), "size": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}


def discard(out: Path) -> None:
    """Remove the imported checkpoint, if there is one, once the release is finished."""
    shutil.rmtree(work_checkpoint(out), ignore_errors=True)


def base_model(facts: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest's base_model takes from an import: a name, a licence, and the provenance in full."""
    if facts is None:
        return {}
    return {"id": Path(facts["file"]).stem, "license": facts.get("license"), "extra": {"imported_from": facts}}
