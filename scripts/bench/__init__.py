"""The parts of scripts/benchmark.py: one module a sub-command, and what they share."""
