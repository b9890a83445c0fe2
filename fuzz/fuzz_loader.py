"""Fuzzes the loader: nothing but TQFormatError, within its limits, and in agreement with validator and oracle.

python fuzz/fuzz_loader.py WORK_CORPUS fuzz/corpus -dict=fuzz/dictionary.txt -max_len=16384 -timeout=30
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import target

if __name__ == "__main__":
    sys.exit(target.main("loader", "tqformat", sys.argv))
