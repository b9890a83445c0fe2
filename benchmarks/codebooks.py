"""The trellis codebooks that come with the package: their error on normally distributed values, and how they are made.

    python benchmarks/codebooks.py [--train]

Prints for each codebook the mean squared error of tiles of 256 values that were not trained on, beside the bound of rate-distortion
theory. With --train, all are trained first (a minute or more each) and replace those in the package.
"""

import argparse

import numpy as np

from reference_quantizer.codes.trellis import METHOD, SHIPPED, encode_tiles, train_codebook, trellis_levels

BITS, WINDOW = range(1, 7), 12
TILES, SEED = 1024, 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python benchmarks/codebooks.py"
    )
    parser.add_argument("--train", action="store_true", help="train them and write them to the package")
    if parser.parse_args().train:
        found = {f"{METHOD}-b{bits}-w{WINDOW}": train_codebook(bits, WINDOW) for bits in BITS}
        np.savez(SHIPPED, **{name: levels[: len(levels) // 2].astype(np.float16) for name, levels in found.items()})
    x = np.random.default_rng(SEED).standard_normal((TILES, 256)).astype(np.float32)
    print("bits  error     bound     above")
    for bits in BITS:
        levels = trellis_levels(bits, WINDOW)
        error = (
            np.square(x - levels[encode_tiles(x, levels, bits, WINDOW)], dtype=np.float64).mean()
            / np.square(x, dtype=np.float64).mean()
        )
        print(f"{bits:4}  {error:.6f}  {0.25**bits:.6f}  {error / 0.25**bits - 1:5.1%}")


if __name__ == "__main__":
    main()
