"""What benchmarks/load.py measures, each in a process of its own; that file starts this one, and reads the JSON that it prints.

    python benchmarks/load_measures.py MEASURE PATH DEVICE   # seconds, processor seconds, bytes over, weights
    python benchmarks/load_measures.py many PATH COUNT       # a manifest of COUNT tiny weights: seconds of each step
    python benchmarks/load_measures.py 3B PATH               # writes a checkpoint of random weights, measures nothing

A measure takes a path, imports and prepares what is not timed, and returns what is: a function whose result holds the
weights, as a model, a state dict, or, where none is kept, the number of those that were seen.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
LLAMA_3B |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}

Run = Callable[[], Any]


def decode(path: str, device: str) -> Run:
    """Ours: one weight after the other, none kept, no digests."""
    from tqformat.load_quantized import Repo

    def run() -> int:
        with Repo(path, verify=False) as repo:
            return sum(repo.dequantize(name, device).numel() for name in repo.names())

    return run


def state_dict(path: str, device: str) -> Run:
    """Ours: all weights at once, digests included."""
    import tqformat

    return lambda: tqformat.load_state_dict(path, device)


def load(path: str, device: str) -> Run:
    """Ours: the ready model, digests included."""
    import tqformat

    model_class(path)
    return lambda: tqformat.load(path, device)


def from_pretrained(path: str, device: str) -> Run:
    """transformers: the ready model of a plain checkpoint."""
    import torch

    made = model_class(path)
    return lambda: made.from_pretrained(path, dtype=torch.bfloat16, device_map=device)


def from_pretrained_read(path: str, device: str) -> Run:
    """The same, and one weight of each page read: where no dtype changes, the model only maps the file."""
    ready = from_pretrained(path, device)

    def run() -> Any:
        model = ready()
        for weight in model.state_dict().values():
            weight.reshape(-1)[:: 4096 // weight.element_size()].sum()
        return model

    return run


def plain(path: str, device: str) -> Run:
    """safetensors: every tensor of a plain checkpoint, read and copied."""
    from safetensors import safe_open

    def run() -> dict[str, Any]:
        state = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, "pt", device=device) as tensors:
                state |= {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
        return state

    return run


def gguf_from_pretrained(path: str, device: str) -> Run:
    """transformers: the ready model of a GGUF file."""
    import gguf  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM

    options = {"gguf_file": Path(path).name, "dtype": torch.bfloat16, "device_map": device}
    return lambda: LlamaForCausalLM.from_pretrained(Path(path).parent, **options)


def gguf_decode(path: str, device: str) -> Run:
    """gguf: one weight after the other, none kept."""
    import torch
    from gguf import GGUFReader, dequantize

    def run() -> int:
        tensors = GGUFReader(path).tensors
        decoded = (torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in tensors)
        return sum(weight.to(device, torch.bfloat16).numel() for weight in decoded)

    return run


def from_memory(encode: Callable[[Any], Any], decode: Callable[[Any], Any]) -> Callable[[str, str], Run]:
    """A peer whose weights are quantized before the clock starts: all weights of the layers, one after the other, none kept.

    Embeddings, norms and reading the file are left out, which is in the peer's favour.
    """

    def prepare(path: str, device: str) -> Run:
        packed = [encode(w) for name, w in plain(path, device)().items() if w.dim() == 2 and "embed" not in name]
        return lambda: sum(decode(each).numel() for each in packed)

    return prepare


def hqq(path: str, device: str) -> Run:
    """HQQ, 4 bits in groups of 64."""
    import torch
    from hqq.core.quantize import Quantizer

    options = {"nbits": 4, "group_size": 64, "axis": 1, "device": device, "compute_dtype": torch.bfloat16}

    def encode(weight: Any) -> Any:
        codes, meta = Quantizer.quantize(weight, optimize=False, **options)
        return Quantizer.to_inplace(codes, meta | {"compute_dtype": torch.bfloat16}, device)

    return from_memory(encode, lambda packed: Quantizer.dequantize(*packed))(path, device)


def nf4(path: str, device: str) -> Run:
    """bitsandbytes, NF4 in blocks of 64."""
    from bitsandbytes import functional

    def encode(weight: Any) -> Any:
        return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    return from_memory(encode, lambda packed: functional.dequantize_4bit(*packed))(path, device)


def torchao(path: str, device: str) -> Run:
    """torchao, 4-bit integers in groups of 64, each in a byte."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def encode(weight: Any) -> Any:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))
        return layer.weight

    return from_memory(encode, lambda packed: packed.dequantize())(path, device)


def compressed_tensors(path: str, device: str) -> Run:
    """compressed-tensors, pack-quantized: 4-bit integers in groups of 64, eight in an int32."""
    import torch
    from compressed_tensors.compressors.pack_quantized import helpers

    def encode(weight: Any) -> Any:
        groups = weight.reshape(len(weight), -1, 64)
        scale = groups.abs().amax(2, keepdim=True) / 7
        codes = (groups / scale).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
        return helpers.pack_to_int32(codes, 4), weight.shape, scale

    def decode(packed: Any) -> Any:
        codes, shape, scale = packed
        values = helpers.unpack_from_int32(codes, 4, shape).to(scale.dtype)
        return (values.reshape(shape[0], -1, 64) * scale).reshape(shape)

    return from_memory(encode, decode)(path, device)


MEASURES: dict[str, Callable[[str, str], Run]] = {
    "decode": decode,
    "load_state_dict": state_dict,
    "tqformat.load": load,
    "bf16 from_pretrained": from_pretrained,
    "bf16 from_pretrained, weights read": from_pretrained_read,
    "bf16 safetensors, copied": plain,
    "GGUF from_pretrained": gguf_from_pretrained,
    "GGUF decode": gguf_decode,
    "HQQ decode": hqq,
    "NF4 decode": nf4,
    "torchao decode": torchao,
    "compressed-tensors decode": compressed_tensors,
}


def model_class(path: str) -> Any:
    """The class that config.json names, imported."""
    import transformers

    config = json.loads((Path(path) / "config.json").read_text("utf-8"))
    return getattr(transformers, config["architectures"][0])


def held(result: Any) -> tuple[int, int]:
    """Of what a measure returns: how many weights, and how many bytes of memory they take."""
    if isinstance(result, int):
        return result, 0
    tensors = result if isinstance(result, dict) else result.state_dict(keep_vars=True)
    different = {t.data_ptr(): t for t in tensors.values()}.values()  # tied weights once
    return sum(t.numel() for t in different), sum(t.numel() * t.element_size() for t in different)


def peak_memory(reset: bool = False) -> int:
    """The peak of this process's resident memory in bytes, since the start or, on Linux, the last reset."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, path: str, device: str = "cpu") -> dict[str, float]:
    """One measure, in this process; the memory of a GPU is what its tensors take."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run, gpu = MEASURES[name](path, device), device != "cpu"
    torch.ones(2**16, device=device).sum().item()  # starts torch's threads, or the GPU
    before = torch.cuda.memory_allocated() if gpu else peak_memory(reset=True)
    start, processor = time.perf_counter(), time.process_time()
    result = run()
    if gpu:
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    peak = torch.cuda.max_memory_allocated() if gpu else peak_memory()
    weights, size = held(result)
    return {"seconds": seconds, "processor": processor, "over": peak - before - size, "weights": weights}


def many(path: str, count: int) -> dict[str, float]:
    """A manifest of `count` tiny weights: seconds to write it, to read it, to open it, for one weight."""
    import numpy as np

    import tqformat
    import tqformat.writer  # and torch with it

    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[name] = time.perf_counter() - start

    stage = {"bits": 4, "codebook": "c", "transform": "h", "scales": np.ones((4, 1), np.float16)}
    stage["codes"] = np.random.default_rng(0).integers(0, 256, (4, 16), dtype=np.uint8)
    about = {"generator": "benchmarks/load.py", "loader_kind": "text-generation"}
    base = {"id": "many", "revision": None, "license": "apache-2.0"}
    method = {"method": "turboquant_mse", "bits": 4}
    with (
        timed("write"),
        tqformat.RepoWriter(path, base_model=base, quantization=method, **about) as writer,
    ):
        writer.add_transform("h", "hadamard", 32, factors=[32], signs="00" * 4)
        writer.add_codebook("c", [float(i) for i in range(16)])
        for i in range(count):
            writer.add_quantized(f"layers.{i // 512}.experts.{i % 512}.weight", [4, 32], "BF16", [stage])
        writer.finish()
    with timed("read_manifest"):
        tqformat.read_manifest(path)
    with timed("open_repo"):
        repo = tqformat.open_repo(path)
    with repo:
        names = repo.names()[:200]
        repo.dequantize(names[0])
        with timed("one weight"):
            for name in names:
                repo.dequantize(name)
        spent["one weight"] /= len(names)
    return spent


def make_3b(path: str) -> None:
    """A Llama of 3.2 billion random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM._from_config(LlamaConfig(**LLAMA_3B), dtype=torch.bfloat16).save_pretrained(path)


def main() -> None:
    name, path, *rest = sys.argv[1:]
    if name == "3B":
        make_3b(path)
    else:
        print(json.dumps(many(path, int(*rest)) if name == "many" else measure(name, path, *rest)))


if __name__ == "__main__":
    main()
