"""The model that ships inside the package: what runs when no `--model` is given.

A real ChatGLM2-layout checkpoint of about three million parameters, made by `scripts/train_demo.py`.
"""

from pathlib import Path


def demo_model_dir() -> Path:
    """The folder with the demo model's config.json, tokenizer.model, tokenizer_config.json and model.safetensors."""
    return Path(__file__).resolve().parent / "demo_model"
