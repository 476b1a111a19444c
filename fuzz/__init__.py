"""Hostile input by the million: what a peer may send, what may lie in a model directory. `python -m fuzz --help`."""
