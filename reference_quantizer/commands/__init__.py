"""The command line: options, and a module for each command."""
