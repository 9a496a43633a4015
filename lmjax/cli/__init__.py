"""The command line: one table of commands, and the exit codes of their errors."""
