"""Fixed prompts: greedy samples of the quantized model, and how close its next-token logits are to the base's."""

import re
from typing import Any

import torch
from torch import Tensor

SAMPLE_TOKENS = 64
GRAM = 16  # characters; shorter ones come again in prose, too
SAMPLE_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short list of three things to pack for a hike in the rain.",
    "What is the sum of 17 and 25? Show the steps.",
)
LOGIT_PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "In the beginning of the story, the old sailor",
)
CLEANING = (
    "Remove the special tokens in the order listed; remove U+0000 to U+0008, U+000B to U+001F, U+007F to U+009F and U+FFFD;"
    " remove spaces and tabs at the end of each line; reduce three or more line feeds in a row to two;"
    " remove spaces, tabs and line feeds at both ends."
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")


def clean(raw: str, special_tokens: list[str]) -> str:
    """`raw` by the rule CLEANING."""
    for token in special_tokens:
        raw = raw.replace(token, "")
    lines = [line.rstrip(" \t") for line in _CONTROLS.sub("", raw).split("\n")]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip(" \t\n")


def repetition(text: str) -> float:
    """The share of the substrings of GRAM characters that stand in `text` before, 0 of a shorter text.

    Near 0 for prose, near 1 for a loop: seq-rep-n (Welleck et al., arXiv:1908.04319) of characters, so that it is the same
    for every tokenizer and for scripts without spaces.
    """
    grams = [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def prompt_logits(model: Any, tokenizer: Any, device: str) -> Tensor:
    """The logits that follow each of LOGIT_PROMPTS, float32 [prompts, vocabulary]."""
    rows = []
    for prompt in LOGIT_PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
        with torch.inference_mode():
            rows.append(model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu())
    return torch.stack(rows)


def cosines(first: Tensor, second: Tensor) -> list[float]:
    """The cosine of each pair of rows, computed in float64."""
    return [
        min(1.0, max(-1.0, float(value))) for value in torch.cosine_similarity(first.double(), second.double(), dim=1)
    ]


def generate(model: Any, base: Any, tokenizer: Any, device: str) -> dict[str, Any]:
    """Greedy continuations of SAMPLE_PROMPTS, as `decoding`, `cleaning` and `samples` of sample_generations.json.

    `base`, the base model, is asked the same, unless it is None.
    """
    chat = bool(getattr(tokenizer, "chat_template", None))
    inputs = [_input(tokenizer, prompt, chat) for prompt in SAMPLE_PROMPTS]
    answers, base_answers = (
        [] if each is None else [_answer(each, tokenizer, device, text, chat) for text in inputs]
        for each in (model, base)
    )
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    raw = [answer["raw"] for answer in answers + base_answers]
    used = [token for token in special if token and any(token in text for text in raw)]
    used.sort(key=lambda token: (-len(token), token))
    for answer in answers + base_answers:
        answer["cleaned"] = clean(answer["raw"], used)
        answer["repetition"] = repetition(answer["cleaned"])
    samples = [
        {"prompt": prompt, "input": text, **answer}
        for prompt, text, answer in zip(SAMPLE_PROMPTS, inputs, answers, strict=True)
    ]
    for sample, answer in zip(samples, base_answers, strict=False):  # none, or one for each
        sample["base"] = answer
    return {
        "decoding": {"method": "greedy", "max_new_tokens": SAMPLE_TOKENS, "chat_template": chat},
        "cleaning": {"rule": CLEANING, "special_tokens": used},
        "samples": samples,
    }


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    end = getattr(model.generation_config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    return [end] if isinstance(end, int) else list(end or ())


def _input(tokenizer: Any, prompt: str, chat: bool) -> str:
    """The text that is tokenized: the prompt, in the chat template if there is one."""
    if not chat:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _answer(model: Any, tokenizer: Any, device: str, text: str, chat: bool) -> dict[str, Any]:
    """How the model goes on after `text`: `tokens`, `stopped` and `raw` of a sample."""
    from transformers import GenerationConfig

    end = _end_tokens(model, tokenizer)
    ids = torch.tensor([tokenizer(text, add_special_tokens=not chat)["input_ids"]], device=device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or [0])[0]
    # in place of the model's own, whose penalties and sampling would otherwise fill in what is not said here
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": SAMPLE_TOKENS, "pad_token_id": padding}
    before, model.generation_config = model.generation_config, GenerationConfig(**options, eos_token_id=end or None)
    try:
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
    finally:
        model.generation_config = before
    raw = tokenizer.decode(out, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stopped = "end" if out and out[-1] in end else "length"
    return {"tokens": len(out), "stopped": stopped, "raw": raw}
