"""The base model as it runs: its weights and tokenizer, the texts that it reads, the machine under it."""
