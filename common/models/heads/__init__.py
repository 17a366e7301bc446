"""Decode heads; each takes the list of a backbone's maps."""
