"""A stage worker: one process that holds a contiguous range of a model's layers on one device, and their KV cache."""
