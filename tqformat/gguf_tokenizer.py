"""A tokenizer.json as the metadata of a GGUF file: tokens, their types, merges or scores, and how text is cut before.

GGUF has no place for a tokenizer's program, only the name of one that llama.cpp knows. So a tokenizer is matched part by part
with those programs, and what fits none of them is refused: other token ids would spoil a model that is right to the last bit.
"""

from typing import Any

from .load_quantized import TQFormatError, require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF
SPACE = "\u2581"  # stands for a space in SentencePiece vocabularies
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(numbers: str) -> list[dict[str, Any]]:
    regex = {"Regex": numbers.join(_WORDS)}
    return [{"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}, _BYTES]


# llama.cpp's name of a byte-level tokenizer -> its pre-tokenizers, normalizers, and whether whole words come before merges
BYTE_LEVEL: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], bool]] = {
    "gpt-2": ([_GPT2], [], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _GPT2], [], False),
    "qwen2": (_split(r"\p{N}"), [{"type": "NFC"}], False),  # llama.cpp itself leaves NFC out
    "llama-bpe": (_split(r"\p{N}{1,3}"), [], True),
}
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_IDLE_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# normalizers and pre-tokenizers of a SentencePiece tokenizer, and whether a space is put before the text
SENTENCEPIECE: list[tuple[list[dict[str, Any]], list[dict[str, Any]], bool]] = [
    ([_TO_SPACE], [], False),
    ([_TO_SPACE], [_IDLE_SPLIT], False),  # no space is left that it could split at
    ([_PREPEND, _TO_SPACE], [], True),
]


def tokenizer_fields(tokenizer: dict[str, Any], special: dict[str, str | None], size: int) -> dict[str, Any]:
    """The metadata of GGUF, key -> value, for a parsed tokenizer.json.

    `special` has the contents of bos_token, eos_token, unk_token and pad_token; `size` is the number of the embedding's rows,
    to which the vocabulary is filled up. Raises TQFormatError for a tokenizer that llama.cpp has no program for.
    """
    model, where = tokenizer["model"], "tokenizer.json"
    require(model["type"] == "BPE", "SCHEMA.VALUE", f"{where}: model.type", "BPE", model["type"])
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(key), "SCHEMA.VALUE", f"{where}: model.{key}", "none, as in GGUF", model.get(key))
    ids: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in tokenizer.get("added_tokens") or ()}
    ids |= {content: token["id"] for content, token in added.items()}
    for content, token in added.items():
        plain = not (token["lstrip"] or token["rstrip"] or token["single_word"])
        require(plain, "SCHEMA.VALUE", f"{where}: added token {content!r}", "one that takes no spaces with it")
    require(
        max(ids.values()) < size,
        "BIND.MODEL",
        where,
        f"at most {size} tokens, the embedding's rows",
        max(ids.values()) + 1,
    )

    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for content, i in ids.items():
        kind = NORMAL if content not in added else CONTROL if added[content]["special"] else USER_DEFINED
        tokens[i], types[i] = content, kind
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    steps = [_flat(tokenizer.get("normalizer"), "normalizers"), _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    fields: dict[str, Any]
    if model.get("byte_fallback"):
        fields = _sentencepiece(steps, tokens, types, merges, special.get("unk_token"))
    else:
        fields = _byte_level(steps, bool(model.get("ignore_merges")))
        fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [" ".join(merge) for merge in merges]}
    fields["tokenizer.ggml.token_type"] = types
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for key, name in names.items():
        if (content := special.get(key)) is not None:
            require(content in ids, "SCHEMA.REFERENCE", f"tokenizer_config.json: {key}", "a token", content)
            fields[f"tokenizer.ggml.{name}_token_id"] = ids[content]
    return fields | _ends(tokenizer.get("post_processor"), special)


def _flat(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in order, without settings that change no token id."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[parts] for inner in _flat(part, parts)]
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def _byte_level(steps: list[list[dict[str, Any]]], ignore_merges: bool) -> dict[str, Any]:
    normalizers, cuts = steps
    for name, (known, allowed, whole) in BYTE_LEVEL.items():
        if cuts == known and normalizers in ([], allowed) and ignore_merges == whole:
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    expected = f"the steps of one of {', '.join(BYTE_LEVEL)}"
    raise TQFormatError(
        "SCHEMA.VALUE", "tokenizer.json: pre_tokenizer", f"expected {expected}, got {[*normalizers, *cuts]}"[:300]
    )


def _sentencepiece(
    steps: list[list[dict[str, Any]]],
    tokens: list[str],
    types: list[int],
    merges: list[tuple[str, ...]],
    unknown: str | None,
) -> dict[str, Any]:
    """SentencePiece's BPE, which has scores in place of merges: of all neighbours that make a token the best token is made.

    That is what the merges do if those of a token stand together, and all its halves are among them; both are checked.
    """
    found = next((prefix for *known, prefix in SENTENCEPIECE if steps == known), None)
    require(found is not None, "SCHEMA.VALUE", "tokenizer.json: normalizer", "the steps of Llama 2 or Gemma", steps)
    ranks: dict[str, int] = {}
    last = None
    for left, right in merges:
        token = left + right
        require(
            token == last or token not in ranks,
            "SCHEMA.VALUE",
            "tokenizer.json: merges",
            "those of a token in a row",
            token,
        )
        last = token
        ranks.setdefault(token, len(ranks))
    known_tokens = set(tokens)
    halves = sum(t[:i] in known_tokens and t[i:] in known_tokens for t in ranks for i in range(1, len(t)))
    require(
        halves == len(merges), "SCHEMA.VALUE", "tokenizer.json: merges", f"all {halves} halves of tokens", len(merges)
    )
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = UNKNOWN
        elif types[i] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
        elif types[i] == USER_DEFINED:  # these are looked for before spaces are replaced
            tokens[i] = token.replace(SPACE, " ")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": found,
    }


def _ends(processor: dict[str, Any] | None, special: dict[str, str | None]) -> dict[str, Any]:
    """Whether the tokens of begin and end are put around a text."""
    parts = [] if processor is None else processor["processors"] if processor["type"] == "Sequence" else [processor]
    around: list[str | None] = [None]  # None stands for the text
    for part in parts:
        if part["type"] == "TemplateProcessing":
            around = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else None for piece in part["single"]]
        else:
            require(
                part["type"] == "ByteLevel",
                "SCHEMA.VALUE",
                "tokenizer.json: post_processor",
                "a template",
                part["type"],
            )
    begin, end = special.get("bos_token"), special.get("eos_token")
    at = around.index(None)
    fits = around[:at] in ([], [begin]) and around[at + 1 :] in ([], [end])
    require(fits, "SCHEMA.VALUE", "tokenizer.json: post_processor", "at most bos before and eos after a text", around)
    return {"tokenizer.ggml.add_bos_token": at == 1, "tokenizer.ggml.add_eos_token": len(around) - at == 2}
