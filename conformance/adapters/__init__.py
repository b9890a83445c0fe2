"""Two implementations behind the protocol of PROTOCOL.md: `reference` (tqformat itself) and `naive` (how not to do it)."""
