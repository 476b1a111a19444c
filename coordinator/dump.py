"""Writes what the running pipeline computed for a prompt, tensor by tensor, to compare two pipelines with."""

from collections.abc import Sequence as AbstractSequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from coordinator.chat_model import ChatModel
from coordinator.errors import DumpError
from coordinator.progress import format_bytes
from protocol.client import SamplingParams, TokenPrompt


def dump(chat_model: ChatModel, token_ids: AbstractSequence[int], out_path: Path) -> dict[str, torch.Tensor]:
    """Feed a prompt and save `embedding`, `layer.{i}.hidden|key|value`, `final_layernorm` and `logits`.

    All are fp32 with the token as leading dimension; i counts from 0. The model must have been launched with
    `record_hidden_states`. Returns what was written.

    Raises:
        GenerationError: the prompt does not fit. DumpError: the file cannot be written.
    """
    engine = chat_model.engine
    greedy = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), 1, True, True)
    sequence = chat_model.begin(TokenPrompt(tuple(token_ids)), greedy).sequence
    try:
        hidden = engine.prefill(sequence)
        tensors = {"embedding": engine.embedding.forward(torch.tensor(list(token_ids)))}
        for layer in range(chat_model.config.num_layers):
            for what in ("hidden", "key", "value"):
                tensors[f"layer.{layer}.{what}"] = chat_model.cluster.inspect(layer, sequence.sequence_id, what)
        tensors["final_layernorm"] = engine.head.final_norm(hidden)
        tensors["logits"] = engine.head.logits(tensors["final_layernorm"])
    finally:
        engine.cancel(sequence)
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, out_path)
    except (SafetensorError, OSError) as error:
        size = format_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        raise DumpError(
            f"{out_path} cannot be written ({error}); it needs {size}: make room or choose another place"
        ) from error
    return tensors
