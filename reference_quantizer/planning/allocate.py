"""Mixed precision under a size: bits for each weight, so that the predicted loss is the least that the size allows.

The prediction is linear (see `sensitivity`): sum over weights of a * t^2(bits), with measured a and measured t^2, times what error
feedback leaves where codes are chosen with it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reference_quantizer.checkpoint.source import Info, Reader, Source
from reference_quantizer.planning.plan import EMBEDDING_BITS, SHORT_TILE_ROWS, Allocation, Plan, is_embedding, make_plan
from reference_quantizer.planning.settings import Settings
from tqformat.load_quantized import TQFormatError, torch_dtype

if TYPE_CHECKING:
    import torch

CANDIDATES = (2, 3, 4, 5, 6, 8)
ALLOCATORS = ("fisher", "perturbation")
SAMPLE = 2**18  # scalars of each weight that are encoded for t^2, which then is known to within half a percent
ROOM = 2**19  # partial choices that the search keeps; where there are more, the result may not be the best one


@dataclass(frozen=True)
class Request:
    """What the options ask for; one of `target_bits` (per weight of the whole payload) and `target_bytes` is None."""

    target_bits: float | None = None
    target_bytes: int | None = None
    candidates: tuple[int, ...] = CANDIDATES
    allocator: str = ALLOCATORS[0]
    texts: tuple[str, ...] = ("self",)
    tokens: int | None = None


class Choice(NamedTuple):
    """The candidate of each weight, and whether it is proven that none is better."""

    indices: np.ndarray  # [weights] int64
    optimal: bool


# ------------------------------------------------------------------------------------------------ the knapsack


def allocate(costs: np.ndarray, sizes: np.ndarray, budget: int) -> Choice:
    """Of each row of `costs` [weights, candidates] one candidate, with the least sum of costs in `budget` bytes.

    `sizes` [weights, candidates] holds bytes. A multiple-choice knapsack, solved exactly: dynamic programming over the
    weights, in which only those partial choices live that the Lagrangian bound allows to become the best (Pisinger 1995).
    Never worse than a column that fits. SCHEMA.VALUE if even the smallest candidates do not fit.
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.int64)
    smallest = int(sizes.min(1).sum())
    if budget < smallest:
        message = f"expected at least {smallest:,} bytes, which the smallest candidates take, got {budget:,}"
        raise TQFormatError("SCHEMA.VALUE", "budget", message)
    price, greedy = _relax(costs, sizes, budget)
    columns = [np.full(len(costs), k) for k in range(costs.shape[1])]
    fitting = [choice for choice in [*columns, greedy] if _total(sizes, choice) <= budget]
    best = min(fitting, key=lambda choice: _total(costs, choice))
    better, optimal = _search(costs, sizes, budget, price, _total(costs, best))
    return Choice(best if better is None else better, optimal)


def _total(table: np.ndarray, choice: np.ndarray) -> Any:
    return table[np.arange(len(table)), choice].sum()


def _relax(costs: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[float, np.ndarray]:
    """The price of a byte at which the cheapest candidates, bytes included, just fit; and these, filled up greedily."""

    def cheapest(price: float) -> np.ndarray:
        return np.lexsort((sizes, costs + price * sizes), axis=1)[:, 0]  # of equals the smaller

    low, high = 0.0, float(np.ptp(costs, axis=1).max())  # at that price a byte outweighs any cost
    choice = cheapest(low)
    if _total(sizes, choice) > budget:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if _total(sizes, cheapest(middle)) > budget else (low, middle)
        choice = cheapest(high)
        if _total(sizes, choice) > budget:
            choice = sizes.argmin(1)  # costs that do not fall with size can leave this alone
    else:
        high = 0.0
    while True:  # the bytes that are left go where they save most
        row = np.arange(len(costs))
        saved = costs[row, choice][:, None] - costs
        fits = sizes - sizes[row, choice][:, None] <= budget - _total(sizes, choice)
        saved[~fits] = 0
        weight, candidate = np.unravel_index(saved.argmax(), saved.shape)
        if saved[weight, candidate] <= 0:
            return high, choice
        choice[weight] = candidate


def _search(
    costs: np.ndarray, sizes: np.ndarray, budget: int, price: float, known: float
) -> tuple[np.ndarray | None, bool]:
    """The best choice if it costs less than `known`, else None; and whether nothing was given up for lack of room.

    With the price p, a choice costs bound + its reduced costs + p * the bytes it leaves, where the bound is
    sum of min (c + p s) - p * budget, and the reduced cost of a candidate is its c + p s above that minimum.
    """
    priced = costs + price * sizes
    reduced = priced - priced.min(1, keepdims=True)
    gap = known - (priced.min(1).sum() - price * budget)  # what reduced costs and bytes left may cost together
    gap += 1e-12 * abs(known)
    alive = reduced <= gap
    order = np.argsort(-np.where(alive & (reduced > 0), reduced, 0).max(1), kind="stable")  # the decisive ones first
    least = np.where(alive, sizes, 2**62).min(1)[order]
    most = np.where(alive, sizes, 0).max(1)[order]
    least_after, most_after = (np.append(np.cumsum(x[::-1])[::-1], 0)[1:] for x in (least, most))

    size, cost = np.zeros(1, np.int64), np.zeros(1)  # of each partial choice
    excess = np.zeros(1)  # and its reduced costs
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # for each weight: where a partial choice comes from, its candidate
    complete = True
    for k, weight in enumerate(order):
        candidates = np.flatnonzero(alive[weight])
        parent = np.tile(np.arange(len(size)), len(candidates))
        candidate = np.repeat(candidates, len(size))
        size = size[parent] + sizes[weight, candidate]
        cost, excess = cost[parent] + costs[weight, candidate], excess[parent] + reduced[weight, candidate]
        left = np.maximum(budget - size - most_after[k], 0)
        keep = np.flatnonzero((size + least_after[k] <= budget) & (excess + price * left <= gap))
        keep = keep[np.lexsort((cost[keep], size[keep]))]
        lowest = np.minimum.accumulate(cost[keep])
        keep = keep[np.append(True, lowest[1:] < lowest[:-1])[: len(keep)]]  # larger only if it costs less
        if len(keep) > ROOM:
            keep, complete = np.sort(keep[np.argpartition(excess[keep], ROOM)[:ROOM]]), False
        size, cost, excess = size[keep], cost[keep], excess[keep]
        steps.append((parent[keep], candidate[keep]))
    if not len(cost) or cost.min() >= known:
        return None, complete
    choice, at = np.zeros(len(costs), np.int64), int(cost.argmin())
    for weight, (parent, candidate) in zip(order[::-1], reversed(steps), strict=True):
        choice[weight], at = candidate[at], parent[at]
    return choice, complete


# ------------------------------------------------------------------------------------------------ the model


def make_allocation(
    source: Source,
    settings: Settings,
    request: Request,
    loader_kind: str,
    cache: Path | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> tuple[Settings, Allocation]:
    """The bits of each weight that `settings` quantize and do not protect; and the settings with the uniform bits.

    Measures the model, unless `cache` (None: the user's) has what an earlier run measured. SCHEMA.VALUE with a target
    that is too small.
    """
    if source.is_inventory:
        message = "a target is met by measuring the model, and here are headers alone; give a checkpoint directory"
        raise TQFormatError("BIND.MISSING_FILE", source.path.name, message)
    from reference_quantizer.calibration.sensitivity import TOKENS, measure_gains, measure_sensitivities
    from reference_quantizer.model.machine import default_cache

    candidates = sorted(set(request.candidates))
    plans = [make_plan(source, replace(settings, bits=bits)) for bits in candidates]
    free = [[t for t in plan.tensors if t.bits is not None and not t.protected] for plan in plans]
    names = [t.info.name for t in free[0]]
    sizes = np.array([[t.stored_bytes for t in column] for column in free], np.int64).T  # [weights, candidates]
    budget = _check_target(request, plans, names)
    tables = {id: book.nbytes for plan in plans for id, book in plan.codebooks.items()}  # of all candidates
    fixed = int(plans[0].accounting()["stored_bytes"] - sizes[:, 0].sum())
    room = budget - fixed + sum(book.nbytes for book in plans[0].codebooks.values()) - sum(tables.values())

    tokens, where = request.tokens or TOKENS[request.allocator], (cache or default_cache(), device, quiet)
    if settings.preset != "fast":  # the number is then that of feedback, which needs more
        tokens = min(tokens, TOKENS[request.allocator])
    measured = measure_sensitivities(source, loader_kind, names, request.allocator, request.texts, tokens, *where)
    notes: list[str] = []
    scalars = {t.info.name: t.info.scalars for t in free[0]}
    sensitivities = fill_in(measured.values, scalars, notes)
    errors = relative_errors(source, plans, names, device)
    if settings.preset != "fast":
        gains = measure_gains(
            source, loader_kind, measured.calibration, settings.output_feedback, SHORT_TILE_ROWS, *where
        )
        helped = np.array([[not (is_embedding(n) and b >= EMBEDDING_BITS) for b in candidates] for n in names])
        errors *= np.where(helped, np.array([gains.get(name, 1.0) for name in names])[:, None], 1.0)
    costs = np.array([sensitivities[name] * errors[k] for k, name in enumerate(names)])  # [weights, candidates]
    uniform_bytes = [int(plan.accounting()["stored_bytes"]) for plan in plans]
    uniform = max(k for k in range(len(candidates)) if uniform_bytes[k] <= budget)
    if uniform == len(candidates) - 1:
        notes.append(f"all weights have {candidates[-1]} bits, the most of the candidates: the target leaves room")
    choice = Choice(np.full(len(names), uniform), True)  # where there is no room for the tables of a mixture
    if sizes.min(1).sum() <= room:
        mixed = allocate(costs, sizes, room)
        choice = mixed if _total(costs, mixed.indices) <= costs[:, uniform].sum() else choice
    if not choice.optimal:
        notes.append("the search had no room for all partial choices: the allocation may not be the best one")
    bits = {name: candidates[k] for name, k in zip(names, choice.indices.tolist(), strict=True)}
    level = candidates[uniform]
    record = {
        "allocator": request.allocator,
        "target_bits": request.target_bits,
        "candidate_bits": candidates,
        "extra": {
            "target_bytes": budget,
            "stored_bytes": 0,  # follows below
            "objective": _rounded(_total(costs, choice.indices)),
            "uniform_bits": level,
            "uniform_bytes": uniform_bytes[uniform],
            "uniform_objective": _rounded(costs[:, uniform].sum()),
            "text": "self" if request.texts == ("self",) else list(measured.calibration.texts),
            "tokens": measured.calibration.tokens,
            "promoted": [name for name in names if bits[name] > level],
            "demoted": [name for name in names if bits[name] < level],
        },
    }
    rounded = {name: _rounded(value) for name, value in sensitivities.items()}
    allocation = Allocation(bits, rounded, record, measured.calibration.to_dict(), tuple(notes))
    settings = replace(settings, bits=level)
    record["extra"]["stored_bytes"] = int(make_plan(source, settings, allocation).accounting()["stored_bytes"])
    return settings, allocation


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _check_target(request: Request, plans: list[Plan], names: list[str]) -> int:
    """The target in bytes; SCHEMA.VALUE if nothing can be chosen, or even the smallest choice is larger."""
    accounting = plans[0].accounting()
    scalars = accounting["quantized_scalars"] + accounting["passthrough_scalars"]
    option, given = "--target-bytes", request.target_bytes
    if given is None:
        option, given = "--target-bpw", int((request.target_bits or 0.0) * scalars / 8)
    if not names:
        raise TQFormatError("SCHEMA.VALUE", option, "no weight is left to allocate: all are protected or left out")
    smallest = int(accounting["stored_bytes"])
    if given < smallest:
        message = (
            f"expected at least {smallest:,} bytes ({8 * smallest / scalars:.4f} bits per weight), got {given:,}; "
        )
        message += "what is kept counts too: give a larger target, smaller --candidate-bits, or protect less"
        raise TQFormatError("SCHEMA.VALUE", option, message)
    return given


def fill_in(values: dict[str, float], scalars: dict[str, int], notes: list[str]) -> dict[str, float]:
    """`values` for all names of `scalars`: where one is unknown, or 0 as where the tokens never reach the weight, the
    median of the others per scalar. What was filled in is told in `notes`.
    """
    known = {name: value for name, value in values.items() if value > 0}
    if not known:
        raise TQFormatError(
            "BIND.MODEL", "sensitivity", "the model has none of the weights by name; give --bits instead"
        )
    each = float(np.median([value / scalars[name] for name, value in known.items()]))
    unknown = [name for name in scalars if name not in known]
    if unknown:
        line = (
            "not measured (no parameter of this name, or no token reaches it): takes the median sensitivity per scalar"
        )
        notes.append(
            f"{unknown[0]}{' and others' * (len(unknown) > 1)}: {line} ({len(unknown)} of {len(scalars)} weights)"
        )
    return {name: known.get(name, each * count) for name, count in scalars.items()}


def relative_errors(source: Source, plans: Sequence[Plan], names: Sequence[str], device: str = "cpu") -> np.ndarray:
    """t^2 = ||W^ - W||^2 / ||W||^2 of each weight as each plan encodes it, float64 [weights, plans].

    Encodes evenly spaced rows, about SAMPLE scalars of a weight. For a trellis, scalar codes stand in, and their error is
    lessened by what the trellis gains on Gaussian data.
    """
    import torch

    from reference_quantizer.codes.chunks import Workers, choose_scale_dtype
    from reference_quantizer.codes.codebook import lloyd_max_levels
    from reference_quantizer.codes.encode import Encoder, encode
    from reference_quantizer.codes.rotation import haar_matrix, make_rotation

    settings, rotations, books = plans[0].settings, {}, {}
    for plan in plans:
        for name, (kind, size, _) in plan.transforms.items():
            matrix = haar_matrix(settings.seed, size) if kind == "dense" and name not in rotations else None
            if name not in rotations:
                rotations[name] = make_rotation(kind, size, settings.seed, matrix, device)
        for t in plan.tensors:
            if t.bits is not None and (t.bits, t.vector_length) not in books:
                levels = lloyd_max_levels(2**t.bits, t.vector_length, settings.grid_size, settings.iterations)
                books[t.bits, t.vector_length] = torch.tensor(levels, device=device)
    columns = [{t.info.name: t for t in plan.tensors} for plan in plans]
    errors = np.zeros((len(names), len(plans)))
    with Reader(source) as reader, Workers(device) as workers:
        for k, name in enumerate(names):
            info, g = columns[0][name].info, columns[0][name].vector_length
            scale_dtype = choose_scale_dtype(info.name, reader.row_chunks(info), workers, g, settings.scale_dtype)
            rows = sample_rows(reader, info).to(device)
            for j, column in enumerate(columns):
                item = column[name]
                rotation, levels = rotations[item.stages[0].transform], books[item.bits, g]
                encoder = Encoder(g, rotation, levels, torch_dtype(scale_dtype), torch_dtype(info.dtype))
                found = encode(rows, encoder)
                errors[k, j] = found.squared_error / found.squared_norm if found.squared_norm else 0.0
                if item.tile_rows:
                    errors[k, j] *= trellis_gain(item.bits or 0, plans[j].settings.window or 0, settings.codebook)
    return errors


@functools.cache
def trellis_gain(bits: int, window: int, codebook: str = "trained") -> float:
    """The error of a trellis with a trained or a computed `codebook` over that of a Lloyd-Max quantizer of the same bits, both on Gaussian data."""
    from reference_quantizer.codes import trellis
    from reference_quantizer.codes.codebook import lloyd_max_levels

    x = trellis.gaussian_samples(2**14, np.random.default_rng(0)).reshape(-1, 256)
    levels = trellis.trellis_levels(bits, window) if codebook == "trained" else None
    if levels is None:
        levels = trellis.computed_levels(window) * np.float32(trellis.computed_scale(bits))
    books = levels, lloyd_max_levels(2**bits, 2**20, 8193, 96)
    chosen = [book[trellis.encode_tiles(x, book, bits, w)] for book, w in zip(books, (window, bits), strict=True)]
    ours, scalar = (float(((y - x) ** 2).mean()) for y in chosen)
    return ours / scalar


def sample_rows(reader: Reader, info: Info) -> "torch.Tensor":
    """Evenly spaced rows of a weight, about SAMPLE scalars, float32 [rows, cols]."""
    import torch

    step, seen, chosen = max(1, info.scalars // SAMPLE), 0, []
    for chunk in reader.row_chunks(info):
        chosen.append(chunk[-seen % step :: step].to(torch.float32, copy=True))  # the chunk's memory is used again
        seen += len(chunk)
    return torch.cat(chosen) if chosen else torch.empty(0, info.cols)
