"""Error and time of trellis codes with trained and with computed levels, on weights of a checkpoint.

    python benchmarks/computed_levels.py CHECKPOINT [--bits 2 3] [--window 12 14 16] [--levels trained computed] [--weights NAME ...]

Weights are encoded as `quantize --preset best` does, but for inputs that all count alike: hadamard rotation, a scale for
each row, tiles as the plan chooses them. Prints the relative squared error and the processor seconds of each weight as JSON
lines. A trained codebook of another window than 12 is trained first, once, which takes minutes (14) or an hour (16).
"""

import argparse
import json
import time

import torch

from reference_quantizer.checkpoint.source import Reader, open_source
from reference_quantizer.codes import feedback, trellis
from reference_quantizer.codes.encode import Encoder
from reference_quantizer.codes.rotation import make_rotation
from reference_quantizer.planning.plan import choose_tile_rows

WEIGHTS = [
    "model.layers.10.self_attn.q_proj.weight",
    "model.layers.20.mlp.up_proj.weight",
    "model.layers.5.self_attn.k_proj.weight",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--window", type=int, nargs="+", default=[12, 14, 16])
    parser.add_argument("--levels", nargs="+", choices=["trained", "computed"], default=["trained", "computed"])
    parser.add_argument("--weights", nargs="+", metavar="NAME", default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source, weights = open_source(args.checkpoint), {}
    with Reader(source) as reader:
        for name in args.weights:
            weights[name] = torch.cat([rows.float() for rows in reader.row_chunks(source.tensors[name])])
    for bits in args.bits:
        for window in args.window:
            for kind in args.levels:
                computed = kind == "computed"
                levels = trellis.computed_levels(window) if computed else trellis.trellis_levels(bits, window)
                scale = trellis.computed_scale(bits) if computed else 1.0
                line = {"bits": bits, "window": window, "levels": kind, "error": [], "seconds": []}
                for name, weight in weights.items():
                    cols, rows = weight.shape[1], choose_tile_rows(source.tensors[name], bits, window)
                    rotation, dtypes = make_rotation("hadamard", cols, 42), (torch.float16, torch.bfloat16)
                    encoder = Encoder(cols, rotation, torch.tensor(levels), *dtypes, scale=scale)
                    job = torch.eye(cols), encoder, bits, window, rows
                    if not line["error"]:
                        feedback.encode(weight[:rows], *job)  # compiles the loops
                    start = time.process_time()
                    found = feedback.encode(weight, *job)
                    line["seconds"].append(round(time.process_time() - start, 2))
                    line["error"].append(float(f"{found.relative_error:.4g}"))
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
