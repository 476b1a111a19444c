"""Measurements, each a program of its own: `python -m benchmarks.NAME --help`."""

import os

# As `glmpipe` itself does before torch is imported: spinning threads would take the cores from whose turn it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
