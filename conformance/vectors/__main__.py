"""python -m conformance.vectors OUT: puts the repository of every case on disk, for runtimes that do not use the runner."""

import argparse
import shutil
from pathlib import Path

from conformance.vectors import ROOT, cases, materialise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m conformance.vectors", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to create: OUT/<result>/<area>/<id>/")
    parser.add_argument("--result", choices=("valid", "invalid", "acceptable"), default="*", help="only these cases")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    chosen = cases(arguments.result)
    for case in chosen:
        into = arguments.out / case.relative_to(ROOT)
        into.mkdir(parents=True)
        materialise(case, into / "repo")
        for name in ("case.json", "expected.json"):
            if (case / name).exists():
                shutil.copyfile(case / name, into / name)
    print(f"{len(chosen)} cases in {arguments.out}")


if __name__ == "__main__":
    main()
