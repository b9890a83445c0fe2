"""Writes the seed corpus: inputs of small valid vectors, of many kinds; and for each error code, of the smallest invalid one."""

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import target

from conformance.vectors import cases, load_case, materialise

LARGEST, VALID, INVALID = 12_000, 190_000, 80_000  # bytes of one seed, of all valid ones, of all invalid ones
RICHEST = "valid-versions-features-order"  # uses every feature


def main() -> None:
    for old in target.CORPUS.iterdir():
        old.unlink()
    seeds: list[tuple[tuple[object, ...], bytes, str]] = []  # kind, input, name
    with tempfile.TemporaryDirectory() as folder, target.Runner("validator") as runner:
        for number, case in enumerate(cases()):
            about = load_case(case)
            if case.parts[-2] == "products":  # repositories like others
                continue
            if any(step["op"] in ("truncate", "write", "fill", "fifo", "symlink") for step in about.get("recipe", ())):
                continue
            repo = materialise(case, Path(folder) / str(number))
            data = target.from_directory(repo) if all(entry.is_file() for entry in repo.iterdir()) else None
            if not data or len(data) > LARGEST:
                continue
            area, name = case.parts[-2:]
            if about["result"] == "valid" and runner(data) == "decoded":
                kind = (area, name if area == "transforms" else re.sub(r"[0-9x]+", "", name), *about["features"])
                seeds.append((("valid", *kind), data, f"valid-{area}-{name}"))
            elif about["result"] == "invalid" and (code := runner(data)) in about["codes"]:
                seeds.append((("invalid", code, area), data, f"invalid-{area}-{name}"))
    # of each kind the smallest first
    seeds.sort(key=lambda seed: (len(seed[1]), seed[2]))
    seen: dict[object, int] = {}
    ranked = []
    for kind, data, name in seeds:
        seen[kind] = seen.get(kind, 0) + 1
        if kind[0] == "valid" or seen[kind] == 1:
            ranked.append((seen[kind] * (name != RICHEST), len(data), name, data))
    room = {"valid": VALID, "invalid": INVALID}
    for _, size, name, data in sorted(ranked):
        if room[name.partition("-")[0]] >= size:
            room[name.partition("-")[0]] -= size
            (target.CORPUS / name).write_bytes(data)
    sizes = [path.stat().st_size for path in target.CORPUS.iterdir()]
    print(f"{len(sizes)} seeds, {sum(sizes)} bytes")


if __name__ == "__main__":
    main()
