"""The parts of scripts/evidence.py: what a plan asks for, what results say, and the pages that tell it."""
