"""Writes the seed corpus: small vectors, one for each distinct set of decode settings first, then the smallest others."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import target

from conformance.vectors import cases, load_case

LARGEST, TOTAL = 6_000, 200_000


def main() -> None:
    for old in target.CORPUS.iterdir():
        old.unlink()
    seeds = []
    with target.Runner("validator") as runner:
        for case in cases("valid"):
            data = target.from_directory(case / "repo") if (case / "repo").is_dir() else None
            if data and len(data) <= LARGEST and runner(data) == "decoded":
                seeds.append((len(data), "-".join(case.parts[-2:]), tuple(load_case(case)["features"]), data))
    seeds.sort()
    kinds: dict[object, int] = {}
    ranked = []
    for size, name, features, data in seeds:
        key = (name.partition("-")[0], features)
        kinds[key] = kinds.get(key, 0) + 1
        ranked.append((kinds[key], size, name, data))
    total = 0
    for _, size, name, data in sorted(ranked):
        if total + size <= TOTAL:
            total += size
            (target.CORPUS / name).write_bytes(data)
    print(f"{len(list(target.CORPUS.iterdir()))} seeds, {total} bytes")


if __name__ == "__main__":
    main()
