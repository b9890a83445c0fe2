"""Does vLLM, serving RELEASE, answer what transformers does, on one rank and on three, requests by themselves and beside others?

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
from contextlib import suppress
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
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                found, together = timed(lambda: list(pool.map(server.complete, PROMPTS)))
            again, alone = timed(lambda: [server.complete(PROMPTS[0])])
        same = sum(a == b for a, b in zip(expected, found, strict=True))
        same_alone = again == expected[:1]
        wrong += len(PROMPTS) - same + (not same_alone)
        print(f"ranks {n}: ready after {ready:.0f} s; {TOKENS} tokens a prompt, compared with transformers")
        print(
            f"  {len(PROMPTS)} at once: {same} the same, {together:.1f} s; the first alone: {same_alone:d}, {alone:.1f} s"
        )
        for prompt, wanted, answer in zip(PROMPTS, expected, found, strict=True):
            if wanted != answer:
                print(f"  {prompt!r}: transformers, vLLM", wanted, answer, sep="\n    ")
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
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what is left in a session of its own
        self.process.wait()

    def complete(self, prompt: str) -> list[int]:
        """The greedy tokens that follow `prompt`."""
        body = {"model": "it", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/completions", data, kind)) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return tokens


if __name__ == "__main__":
    main()
