"""int8 and int4 on NVIDIA cards: this project's own CUDA C, compiled at load for the card at hand."""
