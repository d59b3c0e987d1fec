"""The `graft` command: argument parsing and printing, one file per group of commands."""
