"""The JSON schemas of tqformat, as package data."""
