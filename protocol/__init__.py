"""The words processes of glmpipe exchange: messages, frames, tensors, limits. Knows nothing of GLM; see README.md."""
