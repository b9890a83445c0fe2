"""The rotations and codebooks that a plan names: as tensors to encode with, and as entries of the manifest."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference_quantizer.codes import codebook, trellis, vector
from reference_quantizer.codes.encode import SIGN_LEVELS
from reference_quantizer.codes.rotation import Rotation, haar_matrix, hadamard_factors, make_rotation, seed_signs
from reference_quantizer.planning.plan import Book, Plan
from reference_quantizer.planning.settings import Settings


@dataclass(frozen=True)
class Tables:
    """What weights share, by the ids of the plan."""

    rotations: dict[str, Rotation]
    levels: dict[str, Tensor]  # float32 on the device, [entries] or [entries, p]
    transforms: dict[str, dict[str, Any]]  # arguments of RepoWriter.add_transform
    codebooks: dict[str, dict[str, Any]]  # and of RepoWriter.add_codebook


def make_tables(plan: Plan, device: str) -> Tables:
    """All tables of `plan`; a codebook that neither the package nor the user's cache has is trained, which takes minutes."""
    tables = Tables({}, {}, {}, {})
    for id, (kind, size, seed) in plan.transforms.items():
        matrix = haar_matrix(seed, size) if kind == "dense" else None
        tables.rotations[id] = make_rotation(kind, size, seed, matrix, device)
        entry: dict[str, Any] = {"kind": kind, "size": size}
        if kind == "hadamard":
            factors, signs = list(hadamard_factors(size) or ()), seed_signs(seed, size).hex()
            entry |= {"factors": factors, "signs": signs, "seed": seed}
        elif matrix is not None:
            entry |= {"matrix": torch.from_numpy(matrix), "extra": {"method": "haar", "seed": seed}}
        tables.transforms[id] = entry
    for id, book in plan.codebooks.items():
        entry = make_codebook(book, plan.settings)
        tables.codebooks[id] = entry
        tables.levels[id] = torch.as_tensor(entry["values"]).float().to(device)
    return tables


def make_codebook(book: Book, settings: Settings) -> dict[str, Any]:
    """The arguments of RepoWriter.add_codebook: `values`, their `origin`, and whether they are `stored` in the payload."""
    if book.computed:
        levels = torch.tensor(trellis.computed_levels(book.window)).half()
        return {"values": levels, "origin": {"method": trellis.COMPUTED}, "stored": True}
    if book.stored:
        method = trellis.METHOD if book.window else vector.METHOD
        make = trellis.trellis_levels if book.window else vector.vector_levels
        levels = torch.tensor(make(book.bits, book.window or book.dimension)).half()
        return {"values": levels, "origin": {"method": method}, "stored": True}
    if book.sign:
        return {"values": list(SIGN_LEVELS), "origin": {"method": "unbiased-sign"}}
    construction = {"vector_length": book.vector_length}
    construction |= {"grid_size": settings.grid_size, "iterations": settings.iterations}
    levels = torch.tensor(codebook.lloyd_max_levels(book.entries, **construction))
    return {"values": levels, "origin": {"method": codebook.METHOD} | construction}
