"""Ask a released model a question.

python -I demo/ask.py REPO QUESTION...        with nothing but its own load_quantized.py
python demo/ask.py --packed REPO QUESTION...  with tqformat, its weights packed
"""

import sys

packed = sys.argv[1] == "--packed"
repo, *questions = sys.argv[1 + packed :]
if packed:
    import tqformat
    from tqformat.packed import kernels, resident_bytes

    model, tokenizer = tqformat.load(repo, packed=True), tqformat.load_tokenizer(repo)
    by = "tqformat-kernels" if kernels() else "torch alone"
    print(f"{resident_bytes(model):,} bytes of weights in memory, products by {by}")
else:
    sys.modules["tqformat"] = None  # type: ignore[assignment]  # from here on `import tqformat` fails
    sys.path.insert(0, repo)
    sys.dont_write_bytecode = True
    from load_quantized import load_quantized_model, load_tokenizer

    model, manifest = load_quantized_model(repo, device="cpu")
    tokenizer = load_tokenizer(repo)
    of = f"{manifest['base_model']['id']} at {manifest['quantization']['bits']} bit"
    print(f"{of}, {sum(p.numel() for p in model.parameters()):,} weights")
for question in questions:
    chat = [{"role": "user", "content": question}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**batch, max_new_tokens=80, do_sample=False)
    print(f"\nQ: {question}\nA: {tokenizer.decode(output[0, batch['input_ids'].shape[1] :], skip_special_tokens=True)}")
