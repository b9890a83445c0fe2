"""The conformance suite of tqformat: a validator, an oracle and test vectors that share no code with `tqformat`."""
