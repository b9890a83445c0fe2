"""Does vLLM, serving RELEASE, answer what transformers does, on one rank and on three, one request at a time and many at once?

    python benchmarks/serving.py RELEASE [RANKS ...]        (default: 1 3; `make vllm` runs it)

Greedy tokens of each prompt from the model that tqformat.load gives, then from vLLM's OpenAI interface, both in float32, where
another order of sums changes no choice. Ends with an error if one differs. Needs vLLM, transformers and accelerate. Ranks have to
divide the model's attention heads, of which SmolLM2 has 9.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
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
PATIENCE = 600  # seconds that a server has to start
PLAIN = """
import json, sys, torch, tqformat
model = tqformat.load(sys.argv[1], dtype=torch.float32)
tokenizer = tqformat.load_tokenizer(sys.argv[1])
with torch.inference_mode():
    for prompt in json.loads(sys.argv[2]):
        given = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(given, max_new_tokens=int(sys.argv[3]), do_sample=False)[0, given.shape[1]:].tolist()
        print(json.dumps(tokens))
"""


def main() -> None:
    release, ranks = sys.argv[1], [int(n) for n in sys.argv[2:]] or [1, 3]
    command = [sys.executable, "-c", PLAIN, release, json.dumps(PROMPTS), str(TOKENS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    expected = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = 0
    for n in ranks:
        start = time.monotonic()
        with Server(release, n) as server:
            ready = time.monotonic() - start
            found, alone = timed(lambda: [server.complete(prompt) for prompt in PROMPTS])
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                many, together = timed(lambda: list(pool.map(server.complete, PROMPTS)))
        same = [sum(a == b for a, b in zip(expected, answers, strict=True)) for answers in (found, many)]
        wrong += 2 * len(PROMPTS) - sum(same)
        print(f"ranks {n}: ready after {ready:.0f} s; {len(PROMPTS)} prompts, {TOKENS} tokens each")
        print(f"  one at a time: {same[0]} as transformers, {alone:.1f} s; all at once: {same[1]}, {together:.1f} s")
        for prompt, *answers in zip(PROMPTS, expected, found, many, strict=True):
            if answers[0] != answers[1] or answers[0] != answers[2]:
                print(f"  {prompt!r}: transformers, alone, together", *answers, sep="\n    ")
    sys.exit(f"{wrong} answers differ" if wrong else 0)


def timed(work: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


class Server:
    """vLLM's server of a release on a free port of this machine, as a context manager."""

    def __init__(self, release: str, ranks: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(ranks)]
        options += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--served-model-name", "it"]
        options += ["--generation-config", "vllm"]  # no sampling settings of the release
        cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; more ranks than NUMA nodes
        # What `vllm serve` starts; that command itself fails in vllm-cpu, whose distribution is not named vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", release, *options]
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
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)  # a session of its own: nothing else is in that group
                try:
                    self.process.wait(60)
                except subprocess.TimeoutExpired:
                    continue

    def complete(self, prompt: str) -> list[int]:
        """The greedy tokens that follow `prompt`."""
        body = {"model": "it", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/completions", data, kind)) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return tokens


if __name__ == "__main__":
    main()
