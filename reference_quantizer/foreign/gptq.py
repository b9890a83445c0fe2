"""GPTQ and AWQ: W = scale * (code - zero), with the transpose of the weight in 32-bit words.

GPTQ (arXiv:2210.17323), as AutoGPTQ and GPTQModel store it: `qweight` int32 [cols * bits / 32, rows], `qzeros` int32
[groups, rows * bits / 32], `scales` [groups, rows], `g_idx` int32 [cols] the group of each column, which activation order
makes unsorted. Version 1 stores each zero less one. AWQ (arXiv:2306.00978), version gemm: `qweight` int32 [cols, rows / 8],
`qzeros` [groups, rows / 8], eight numbers of a word in the order 0, 2, 4, 6, 1, 3, 5, 7.

Both multiply in the dtype of the scales, where code - zero is exact; the weight has that dtype, so that it is the same.
"""

from typing import Any

import torch

from reference_quantizer.foreign.integers import dtype_of, grouped, need_parts, words_to_fields
from reference_quantizer.foreign.parts import Weight
from tqformat.load_quantized import TQFormatError

Parts = dict[str, torch.Tensor]
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # field of a word that holds the k-th number


def read_gptq(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method gptq."""
    need_parts(name, parts, ".qweight", ".scales")
    version = settings.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        message = f"the layout {version!r} is that of a kernel; expected gptq or gptq_v2, to which GPTQModel converts"
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    words, scales = parts[".qweight"], parts[".scales"]
    groups, rows = scales.shape
    if ".g_idx" in parts:
        group = parts[".g_idx"].long()
    else:
        size = int(settings.get("group_size", -1))
        cols = size * groups if size > 0 else words.shape[0] * 32 // int(settings["bits"])
        group = torch.arange(cols) // (cols // groups)
    cols = len(group)
    bits = words.shape[0] * 32 // cols
    if (
        not 1 <= bits <= 8
        or words.shape != (cols * bits // 32, rows)
        or not 0 <= int(group.min()) <= int(group.max()) < groups
    ):
        raise TQFormatError(
            "CONTAINER.SHAPE", name, f"qweight {list(words.shape)} and scales {list(scales.shape)} do not fit"
        )
    codes = words_to_fields(words.t(), bits, cols)
    zeros = None
    if ".qzeros" in parts:
        zeros = words_to_fields(parts[".qzeros"], bits, rows).int()
        if version == "gptq":
            if bool((zeros == (1 << bits) - 1).any()):
                message = "a zero point is stored as the largest number, which programs read as 0 or as the next power of two;"
                message += " convert the checkpoint to gptq_v2 with the program that made it"
                raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
            zeros = zeros + 1
        zeros = zeros.t()
    stage = grouped(codes, bits, scales.t(), zeros, group)
    return Weight(name, (rows, cols), dtype_of(scales, name), (stage,))


def read_awq(name: str, parts: Parts, settings: dict[str, Any]) -> Weight:
    """A weight of the quant_method awq."""
    need_parts(name, parts, ".qweight", ".scales", ".qzeros")
    version, bits = str(settings.get("version", "gemm")).lower(), int(settings.get("bits", settings.get("w_bit", 4)))
    if version != "gemm" or bits != 4:
        message = (
            f"expected AWQ of version gemm and 4 bits, got {version} and {bits}; the other layouts are those of kernels"
        )
        raise TQFormatError("UNSUPPORTED.LIBRARY", name, message)
    words, scales = parts[".qweight"], parts[".scales"]
    (cols, _), (groups, rows) = words.shape, scales.shape
    if words.shape != (cols, rows // 8) or cols % groups:
        raise TQFormatError(
            "CONTAINER.SHAPE", name, f"qweight {list(words.shape)} and scales {list(scales.shape)} do not fit"
        )

    def fields(data: torch.Tensor) -> torch.Tensor:  # [n, rows / 8] -> [rows, n]
        found = words_to_fields(data, 4, rows).reshape(len(data), -1, 8)
        return found[:, :, AWQ_PLACES].reshape(len(data), rows).t()

    stage = grouped(
        fields(words).contiguous(), 4, scales.t(), fields(parts[".qzeros"]), torch.arange(cols) // (cols // groups)
    )
    return Weight(name, (rows, cols), dtype_of(scales, name), (stage,))
