"""Lets another implementation prove itself: `python -m conformance run --entrypoint EXE`, described in PROTOCOL.md.

The reading order: protocol.py (one session with the implementation), score.py (one answer judged), describe.py (what is
given to a writer, and what it wrote judged), weaknesses.py (names for failures), run.py (all cases, reports, command
line), html.py (the report for people).
"""
