"""Ask a released model a question with nothing but its own load_quantized.py: python -I demo/ask.py REPO QUESTION..."""

import sys

sys.modules["tqformat"] = None  # type: ignore[assignment]  # from here on `import tqformat` fails
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True

from load_quantized import load_quantized_model, load_tokenizer  # noqa: E402

model, manifest = load_quantized_model(sys.argv[1], device="cpu")
tokenizer = load_tokenizer(sys.argv[1])
print(
    f"{manifest['base_model']['id']} at {manifest['quantization']['bits']} bit, {sum(p.numel() for p in model.parameters()):,} weights"
)
for question in sys.argv[2:]:
    chat = [{"role": "user", "content": question}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**batch, max_new_tokens=80, do_sample=False)
    print(f"\nQ: {question}\nA: {tokenizer.decode(output[0, batch['input_ids'].shape[1] :], skip_special_tokens=True)}")
