"""The main job at the scale of a 0.8B vision-language model with random weights: storage to the byte, memory, time.

    python benchmarks/scale.py CONFIG_DIR INVENTORY.json WORK_DIR [--bits 2] [--device cpu]

CONFIG_DIR holds the config.json of the model class; INVENTORY.json gives name, shape and dtype of every tensor of the
checkpoint, {name: {"shape": [...], "dtype": "BF16"}}. Tensors that the class does not have (the mtp.* of Qwen3.5) are added
to the checkpoint with random values, so that quantizing and loading must cope with them. Prints one JSON object.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def child(code: str, *args: str) -> dict[str, Any]:
    """Runs `code` in a fresh interpreter; the dict it prints last, with wall seconds and peak resident MiB."""
    start = time.monotonic()
    tail = "\nimport resource, json\nprint(json.dumps(out | {'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))"
    done = subprocess.run([sys.executable, "-c", code + tail, *args], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": round(time.monotonic() - start, 1)}


BUILD = """
import sys, json, torch, transformers
from safetensors.torch import save_file
config_dir, inventory, out_dir = sys.argv[1:]
torch.manual_seed(0)
config = transformers.AutoConfig.from_pretrained(config_dir)
model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
state = {k: v for k, v in model.state_dict().items()}
wanted = json.load(open(inventory))
dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
tensors = {}
for name, entry in wanted.items():
    value = state.get(name)
    if value is None or list(value.shape) != entry["shape"]:
        value = torch.randn(entry["shape"]) * 0.02
    tensors[name] = value.to(dtypes[entry["dtype"]]).contiguous()
save_file(tensors, out_dir + "/model.safetensors")
config.architectures = [type(model).__name__]
config.save_pretrained(out_dir)
out = {"tensors": len(tensors), "not_in_class": sorted({n.split(".")[0] for n in wanted if n not in state})}
"""
QUANTIZE = """
import sys
from reference_quantizer.__main__ import main
src, dst, bits, device = sys.argv[1:]
code = main(["quantize", src, dst, "--bits", bits, "--uniform", "--device", device, "--quiet"])
assert not code, code
out = {}
"""
LOAD = """
import sys, resource, torch, transformers, accelerate, tqformat
auto = transformers.AutoModelForImageTextToText
from transformers.models.qwen3_5 import modeling_qwen3_5
if sys.argv[2] == "cuda":
    torch.zeros(1, device="cuda")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
model = tqformat.load(sys.argv[1], device=sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
weights = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
finished = sum(weights.values()) / 2**20
over = peak - before - finished
if sys.argv[2] == "cuda":
    over = torch.cuda.max_memory_allocated() / 2**20 - finished
state, wrong, compared = model.state_dict(), [], 0
with tqformat.open_repo(sys.argv[1], verify=False) as repo:
    for name in repo.names():
        if name in state:
            compared += 1
            if not torch.equal(state[name], repo.dequantize(name, sys.argv[2]).to(state[name].dtype)):
                wrong.append(name)
    ignored = [name for name in repo.names() if name not in state]
tied = [n for n in state if n not in repo.manifest.tensors]
out = {"class": type(model).__name__, "finished_mib": round(finished), "over_finished_mib": round(over), "compared": compared,
       "wrong": wrong, "ignored": sorted({n.split(".")[0] for n in ignored}), "ignored_count": len(ignored), "tied": tied,
       "training": model.training}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config_dir")
    parser.add_argument("inventory")
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--bits", default="2")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    checkpoint, repo = args.work_dir / "checkpoint", args.work_dir / f"release-{args.bits}bit"
    report: dict[str, Any] = {}
    if not (checkpoint / "model.safetensors").exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        report["build"] = child(BUILD, args.config_dir, args.inventory, str(checkpoint))
    shutil.rmtree(repo, ignore_errors=True)
    report["quantize"] = child(QUANTIZE, str(checkpoint), str(repo), args.bits, args.device)
    manifest = json.loads((repo / "quant_manifest.json").read_text())
    report["accounting"] = manifest["accounting"]
    payload = 0
    for file in repo.glob("*.safetensors"):  # recounted from the headers, by no code of ours
        with open(file, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        sizes = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
        payload += sum(math.prod(e["shape"]) * sizes[e["dtype"]] for k, e in header.items() if k != "__metadata__")
    report["payload_bytes_recounted"] = payload
    report["load"] = child(LOAD, str(repo), args.device)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
