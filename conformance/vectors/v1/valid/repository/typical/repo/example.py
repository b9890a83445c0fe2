raise SystemExit("a reader must not run this")
