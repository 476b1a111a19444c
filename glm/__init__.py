"""The GLM network itself, as if it ran on one device. Knows nothing of processes, sockets or other hosts."""
