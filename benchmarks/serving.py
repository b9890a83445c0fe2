"""Does vLLM, serving RELEASE, answer what transformers does, decoded and packed, on one rank and on three, alone and in parallel?

    python benchmarks/serving.py RELEASE [RANKS ...]        (default: 1 3; `make vllm` runs it)
    python benchmarks/serving.py RELEASE --speed [--base CHECKPOINT]

Greedy tokens of each prompt from the model that tqformat.load gives, then from vLLM's OpenAI interface, both in float32, where
another order of sums changes no choice. Packed weights are not rounded to their dtype, so that a choice between two tokens
that are nearly as likely may differ: answers may part at a choice that transformers makes by less than TIE. Ends with an error
if one differs. Ranks have to divide the model's attention heads, of which SmolLM2 has 9.

With --speed, tokens a second of one request and of eight at once, in bfloat16 on one rank, of the release decoded and packed,
and of a plain checkpoint: medians of rounds in turn, all servers running, and what their processes have in memory.

Needs vLLM, transformers and accelerate; tqformat-kernels for packed weights, which are left out without.
"""

import argparse
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three primary colours are",
    "A good way to learn a language is",
    "In 1969,",
    "The opposite of hot is",
]
TOKENS = 16
TIE = 0.1  # nats between the two likeliest tokens, in a model of packed weights; about five times what rounding changes
ROUNDS, LONG = 3, 64  # of --speed: rounds, and tokens a request
PATIENCE = 600  # seconds that a server has to start
PLAIN = """
import json, sys, torch, tqformat
model = tqformat.load(sys.argv[1], dtype=torch.float32)
tokenizer = tqformat.load_tokenizer(sys.argv[1])
options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
with torch.inference_mode():
    for prompt in json.loads(sys.argv[2]):
        given = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(given, max_new_tokens=int(sys.argv[3]), **options)
        two = torch.cat(found.logits).topk(2).values
        print(json.dumps([found.sequences[0, given.shape[1]:].tolist(), (two[:, 0] - two[:, 1]).tolist()]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("release")
    parser.add_argument("ranks", nargs="*", type=int, default=[1, 3])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--base", help="a plain checkpoint, for --speed")
    args = parser.parse_args()
    kinds = [False, True] if importlib.util.find_spec("tqformat_kernels") else [False]
    if args.speed:
        speed([(args.release, packed) for packed in kinds] + [(args.base, None)] * bool(args.base))
    else:
        compare(args.release, args.ranks, kinds)


def compare(release: str, ranks: list[int], kinds: list[bool]) -> None:
    command = [sys.executable, "-c", PLAIN, release, json.dumps(PROMPTS), str(TOKENS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    expected = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = 0
    for n, packed in [(n, packed) for n in ranks for packed in kinds]:
        start = time.monotonic()
        with Server(release, packed, n, "float32") as server:
            ready = time.monotonic() - start
            found, together = timed(lambda: server.together(TOKENS))
            alone, seconds = timed(lambda: server.complete(PROMPTS[0], TOKENS))
        print(f"{'packed' if packed else 'decoded'}, ranks {n}: ready after {ready:.0f} s; {TOKENS} tokens a prompt")
        print(f"  {len(PROMPTS)} at once in {together:.1f} s, the first alone in {seconds:.1f} s; beside transformers'")
        answers = [*zip(PROMPTS, expected, found, strict=True), (PROMPTS[0], expected[0], alone)]
        parted = [answer for answer in answers if answer[1][0] != answer[2]]
        print(f"  the same: {len(answers) - len(parted)} of {len(answers)}, the last being the one alone")
        for prompt, (wanted, margins), answer in parted:
            at = next(i for i in range(len(wanted)) if wanted[: i + 1] != answer[: i + 1])
            print(f"  {prompt!r}: they part at token {at}, which transformers chose by {margins[at]:.3f} nats; both:")
            print(f"    {wanted}\n    {answer}")
            wrong += not packed or margins[at] > TIE
    sys.exit(f"{wrong} answers differ" if wrong else 0)


def speed(cases: list[tuple[str, bool | None]]) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(path, packed, 1, "bfloat16")) for path, packed in cases]
        alone: list[list[float]] = [[] for _ in cases]
        together: list[list[float]] = [[] for _ in cases]
        for _ in range(ROUNDS + 1):
            for server, one, all_ in zip(servers, alone, together, strict=True):
                one.append(LONG / timed(lambda server=server: server.complete(PROMPTS[0], LONG, True))[1])
                all_.append(len(PROMPTS) * LONG / timed(lambda server=server: server.together(LONG, True))[1])
        for (path, packed), server, one, all_ in zip(cases, servers, alone, together, strict=True):
            kind = {None: "plain", False: "decoded", True: "packed"}[packed]
            figures = [round(statistics.median(found[1:]), 1) for found in (one, all_)]  # the first warms up
            print(f"{kind}: {figures} tokens a second, alone and all at once; {server.mebibytes()} MiB; {path}")


def timed(work: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


class Server:
    """vLLM's server of a model on a free port of this machine, as a context manager."""

    def __init__(self, model: str, packed: bool | None, ranks: int, dtype: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(ranks)]
        options += ["--dtype", dtype, "--enforce-eager", "--max-model-len", "512", "--served-model-name", "it"]
        options += ["--generation-config", "vllm"]  # no sampling settings of the release
        if packed is not None:
            quantization = {"quantization_config": {"quant_method": "tqformat", "packed": packed}}
            options += ["--hf-overrides", json.dumps(quantization)]
        cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; more ranks than NUMA nodes
        cpu["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))  # threads that wait do so by spinning
        # What `vllm serve` starts; that command itself fails in vllm-cpu, whose distribution is not named vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
        self.process = subprocess.Popen(command, env=cpu | os.environ, stdout=sys.stderr, start_new_session=True)

    def __enter__(self) -> "Server":
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        self.__exit__()
        raise SystemExit(f"the server did not start: exit status {self.process.returncode}")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what is left in a session of its own
        self.process.wait()

    def complete(self, prompt: str, tokens: int, on: bool = False) -> list[int]:
        """So many greedy tokens that follow `prompt`; fewer where the model ends, unless `on`."""
        body = {"model": "it", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
        data, kind = json.dumps(body | {"ignore_eos": on}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/completions", data, kind)) as answer:
            found: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return found

    def together(self, tokens: int, on: bool = False) -> list[list[int]]:
        """Those of all prompts, asked for at once."""
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, tokens, on), PROMPTS))

    def mebibytes(self) -> int:
        """What the server's processes have in memory; pages that they share count once (Linux)."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                session = int(status.read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid:
                    lines = status.with_name("smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total >> 10


if __name__ == "__main__":
    main()
