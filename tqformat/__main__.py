"""The command line: python -m tqformat (or tqformat) inspect | verify | export | embed | update."""

import argparse
import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .hub import fetch
from .load_quantized import DTYPES, MANIFEST, Repo, TQFormatError, __version__, open_repo

WRITING = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write, not of a read
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def size_text(count: float) -> str:
    """Bytes for people: 220,568,384 -> '210.35 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def bits_text(per_quantized_weight: float, per_weight: float) -> str:
    """The honest size: what a quantized weight takes with its scales, and what a weight takes on average of all there is."""
    return f"{per_quantized_weight:.3f} bits per quantized weight, {per_weight:.3f} per weight of the whole payload"


def byte_count(text: str) -> int:
    """An option's size in bytes, decimal units allowed: '500M' -> 500,000,000."""
    found = re.fullmatch(r"([0-9]+)([kmgt]?)b?", text.lower())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 5G or 500M, got {text}")
    return int(found[1]) * UNITS[found[2]]


def table_text(header: Sequence[str], rows: list[Sequence[object]], left: int = 1) -> str:
    """Columns for a terminal; the first `left` columns are aligned to the left, the others to the right."""
    cells = [list(header)] + [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


PARTS = ("codes", "scales", "outer_scales", "offsets", "outer_offsets")  # of a stage


def summary(repo: Repo) -> dict[str, Any]:
    """What a repository holds: identity, method, storage by kind and weight, bits per weight.

    `total.bits_per_weight` counts the payload files as they are: passthrough tensors, tables and headers, too.
    """
    m = repo.manifest
    spans = repo.spans
    stored = {name: span.end - span.begin for name, span in spans.items()}
    weights: list[dict[str, Any]] = []
    for name, w in m.tensors.items():
        names = [w.data, w.column_scale, *(getattr(s, part) for s in w.stages or () for part in PARTS)]
        nbytes, scalars = sum(stored[key] for key in names if key is not None), math.prod(w.shape)
        row = {"name": name, "kind": w.kind, "shape": list(w.shape), "dtype": w.dtype, "bits": w.effective_bits}
        weights.append({**row, "scalars": scalars, "stored_bytes": nbytes, "original_bytes": scalars * DTYPES[w.dtype]})
    kinds: dict[str, dict[str, Any]] = {}
    for kind in ("quantized", "passthrough"):
        chosen = [w for w in weights if w["kind"] == kind]
        totals = {key: sum(w[key] for w in chosen) for key in ("scalars", "original_bytes", "stored_bytes")}
        kinds[kind] = {
            "tensors": len(chosen),
            **totals,
            "bits_per_weight": _rate(totals["stored_bytes"], totals["scalars"]),
        }
    scalars = sum(k["scalars"] for k in kinds.values())
    payload = sum(stored.values())
    tables = payload - sum(k["stored_bytes"] for k in kinds.values())
    on_disk = sum(file.size for file in m.files.values() if file.role == "payload")
    return {
        "format_version": m.format_version,
        "features": list(m.features),
        "generator": m.generator,
        "base_model": m.base_model,
        "loader_kind": m.loader_kind,
        "quantization": m.quantization,
        **kinds,
        "tables": {"stored_bytes": tables},
        "total": {
            "tensors": len(weights),
            "scalars": scalars,
            "original_bytes": sum(w["original_bytes"] for w in weights),
            "stored_bytes": payload,
            "payload_file_bytes": on_disk,
            "ratio": round(sum(w["original_bytes"] for w in weights) / payload, 3) if payload else 0,
            "bits_per_weight": _rate(on_disk, scalars),
        },
        "tied_weights": dict(m.tied_weights),
        "files": {name: {"role": file.role, "size": file.size} for name, file in m.files.items()},
        "weights": weights,
    }


def _rate(nbytes: int, scalars: int) -> float:
    return 8 * nbytes / scalars if scalars else 0.0


def inspect(args: argparse.Namespace) -> None:
    with open_repo(fetch(args.repo), verify=False) as repo:
        report = summary(repo)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    report = printable(report)
    q, base, total = report["quantization"], report["base_model"], report["total"]
    print(f"{args.repo}: tqformat {report['format_version']}, written by {report['generator']}")
    print(
        f"base model  {base.get('id')} {base.get('revision') or ''} ({base.get('license') or 'licence not stated'}), {report['loader_kind']}"
    )
    knobs = {k: v for k, v in q.items() if k not in ("method", "bits", "extra") and v not in (None, [], ())}
    print(f"method      {q.get('method')} at {q.get('bits')} bits; " + ", ".join(f"{k} {v}" for k, v in knobs.items()))
    print(f"features    {', '.join(report['features']) or 'none beyond the basic ones'}\n")
    rows: list[Sequence[object]] = []
    for kind in ("quantized", "passthrough"):
        k = report[kind]
        rows.append(
            (kind, k["tensors"], k["scalars"], k["original_bytes"], k["stored_bytes"], f"{k['bits_per_weight']:.3f}")
        )
    if report["tables"]["stored_bytes"]:
        rows.append(("codebooks, rotations", "", "", "", report["tables"]["stored_bytes"], ""))
    files = total["payload_file_bytes"]
    rows.append(("headers", "", "", "", files - total["stored_bytes"], ""))
    bits = f"{total['bits_per_weight']:.3f}"
    rows.append(("total", total["tensors"], total["scalars"], total["original_bytes"], files, bits))
    print(table_text(("", "tensors", "scalars", "original bytes", "stored bytes", "bits/weight"), rows))
    print(f"\nratio {total['ratio']:.3f}; payload files {size_text(files)}")
    print(f"{bits_text(report['quantized']['bits_per_weight'], total['bits_per_weight'])}\n")
    weights = sorted(report["weights"], key=lambda w: -w["scalars"])
    shown = weights if args.all else weights[:12]
    rows = [
        (
            w["name"],
            w["kind"],
            "x".join(map(str, w["shape"])),
            w["dtype"],
            "" if w["bits"] is None else f"{w['bits']:g}",
            w["stored_bytes"],
        )
        for w in shown
    ]
    print(
        table_text(
            ("largest tensors" if not args.all else "tensors", "kind", "shape", "dtype", "bits", "stored bytes"),
            rows,
            left=2,
        )
    )
    if len(shown) < len(weights):
        print(f"... and {len(weights) - len(shown)} more (--all)")


def verify(args: argparse.Namespace) -> None:
    from .embed import LOADER, read_stamp

    start = time.monotonic()
    checks: dict[str, Any] = {}
    with Repo(fetch(args.repo), beside=True) as repo:  # digests are computed beside decoding
        m = repo.manifest
        present = [
            name for name in m.files if (repo.path / name).exists() or m.files[name].role in ("payload", "support")
        ]
        for name in present:
            if m.files[name].role != "payload":
                repo.check_file(name)
        checks["files"] = len(present)
        if LOADER in present:
            checks["loader"] = read_stamp((repo.path / LOADER).read_bytes()).version
        checks["weights"] = len(repo.names())
        decoded = 0
        for i, name in enumerate(repo.names() if args.decode else ()):
            if sys.stderr.isatty():
                print(f"\r\033[Kdecoded {i + 1}/{len(repo.names())} {name[:80]}", end="", file=sys.stderr)
            decoded += repo.dequantize(name, args.device).numel()
        checks["decoded_scalars"] = decoded
    if args.decode and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    seconds = round(time.monotonic() - start, 2)
    if args.json:
        print(json.dumps({"repo": str(args.repo), "ok": True, **checks, "seconds": seconds}))
        return
    decode = f"{decoded:,} scalars decoded" if args.decode else "not decoded"
    loader = f"embedded loader {checks['loader']} unchanged" if "loader" in checks else "no embedded loader"
    print(
        f"ok: {checks['files']} files match their digests, {checks['weights']} weights bound, {decode}, {loader} ({seconds} s)"
    )


def export(args: argparse.Namespace) -> None:
    repo = fetch(args.repo)
    if args.format == "gguf":
        from .gguf_export import export_gguf

        losses = export_gguf(repo, args.out, kind=args.type and args.type.upper(), device=args.device)
        report = {kind: {**asdict(loss), "relative": loss.relative} for kind, loss in losses.items()}
        if args.json:
            print(json.dumps({"out": str(args.out), "types": report}))
            return
        print(f"wrote {args.out}")
        rows: list[Sequence[object]]
        rows = [(kind, t["tensors"], t["scalars"], t["stored_bytes"], *loss_text(t)) for kind, t in report.items()]
        print(table_text(("type", "tensors", "scalars", "stored bytes", "largest error", "relative error"), rows))
        return
    from .load_quantized import torch_dtype
    from .writer import export_safetensors

    dtype = torch_dtype(args.type.upper()) if args.type else None
    out = export_safetensors(repo, args.out, device=args.device, dtype=dtype, max_shard_bytes=args.max_shard_size)
    print(json.dumps({"out": str(out)}) if args.json else f"wrote a plain checkpoint to {out}")


def loss_text(loss: dict[str, Any]) -> tuple[str, str]:
    """The largest and the relative error of a type, or that there is none."""
    if not loss["largest"]:
        return "exact", "exact"
    return f"{loss['largest']:.2e}", f"{loss['relative']:.2e}"


def embed(args: argparse.Namespace) -> None:
    from .embed import embed as embed_loader
    from .embed import stamped_loader

    if args.print:
        sys.stdout.buffer.write(stamped_loader())
        return
    path = embed_loader(args.repo)
    print(
        json.dumps({"loader": str(path), "version": __version__})
        if args.json
        else f"embedded loader {__version__}: {path}"
    )


def update(args: argparse.Namespace) -> None:
    from .support import update_files

    lines = update_files(args.repo, args.dry_run)
    if args.json:
        print(json.dumps({"repo": str(args.repo), "changes": lines, "written": bool(lines) and not args.dry_run}))
        return
    print(*map(printable, lines), sep="\n", end="\n" if lines else "")
    done = "nothing was written (--dry-run)" if args.dry_run else f"{MANIFEST} of {args.repo} fits again"
    print(done if lines else f"{MANIFEST} of {args.repo} fits already")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tqformat" if Path(sys.argv[0]).stem == "tqformat" else "python -m tqformat",
        description="Read tqformat repositories: low-bit model weights that anybody can check and decode.",
        epilog="REPO is a directory, or a Hub id such as owner/name. Exit status: 0 done, 1 the repository is at fault, 2 usage.",
    )
    top.add_argument("--version", action="version", version=f"tqformat {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, repo: dict[str, Any] | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("repo", metavar="REPO", **(repo or {"help": "repository directory or Hub id"}))
        sub.add_argument("--json", action="store_true", help="print one JSON object, for programs")
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "inspect", inspect, "Show what a repository holds: method, storage, honest bits per weight. Needs no torch."
    )
    sub.add_argument("--all", action="store_true", help="list every tensor, not only the largest")
    sub = command("verify", verify, "Check structure, sizes, digests and binding, and decode every weight once.")
    sub.add_argument("--no-decode", dest="decode", action="store_false", help="stop after the digests")
    sub.add_argument("--device", default="cpu", help="where to decode (default: cpu)")
    text = "Write decoded weights for other tools: a plain safetensors checkpoint, or one GGUF file for llama.cpp."
    sub = command("export", export, text)
    sub.add_argument("out", metavar="OUT", help="directory (safetensors) or file (gguf) to create")
    sub.add_argument("--format", choices=("safetensors", "gguf"), default="safetensors", help="(default: %(default)s)")
    help_ = "what floating weights become (default: each as it was); q8_0 for gguf alone. What gguf loses is printed"
    sub.add_argument("--type", choices=("f32", "bf16", "f16", "q8_0"), help=help_)
    sub.add_argument("--device", default="cpu", help="where to decode (default: cpu)")
    help_ = "start a new safetensors file beyond this size: bytes, or with K, M or G (default: 5G)"
    sub.add_argument("--max-shard-size", type=byte_count, default=5 * 10**9, metavar="SIZE", help=help_)
    text = "Put this release's load_quantized.py into a repository directory and its manifest."
    sub = command("embed", embed, text, {"nargs": "?", "help": "repository directory; not needed with --print"})
    sub.add_argument("--print", action="store_true", help="write the stamped loader to standard output instead")
    text = "Make the manifest fit support files, documents and code that you edited, added or removed; weights stay."
    sub = command("update", update, text, {"help": "repository directory"})
    sub.add_argument("--dry-run", action="store_true", help="say what would change, write nothing")
    return top


def printable(value: Any) -> Any:
    """The same with characters that would move the cursor escaped: text of a repository is not to be trusted."""
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [printable(v) for v in value]
    if isinstance(value, str) and not value.isprintable():
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return value


def fail(args: argparse.Namespace, text: str, code: str | None, where: str, message: str) -> int:
    if args.json:
        print(json.dumps({"ok": False, "code": code, "where": where, "message": message}))
    else:
        print(printable(text), file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.run is embed and args.repo is None and not args.print:
        parser().error("embed: expected REPO, or --print")
    if args.run is export and args.format == "safetensors" and args.type == "q8_0":
        parser().error("export: --type q8_0 is for --format gguf")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # torch's threads wait asleep: beside other jobs spinning takes minutes
    try:
        args.run(args)
        sys.stdout.flush()
    except TQFormatError as error:
        return fail(args, f"error {error}", error.code, error.where, error.message)
    except ImportError as error:
        message = f"needs {error.name}, one of the packages that tqformat depends on"
        return fail(args, f"error [UNSUPPORTED.LIBRARY] {message}", "UNSUPPORTED.LIBRARY", str(error.name), message)
    except OSError as error:
        ours = error.filename is None and error.errno in WRITING  # the writer names its files
        if ours:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has seen enough
            return 0
        where = "standard output" if ours else str(error.filename or args.repo)
        message = error.strerror or str(error)
        return fail(args, f"error {where}: {message}" if error.strerror else f"error: {message}", None, where, message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
