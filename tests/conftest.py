"""Small random checkpoints and scripted speculators that the tests share."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

# Tiny models: threads that wait for each other cost more than they give.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first import of triton

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(directory: Path, seed: int = 0, **overrides):
    """A random transformers llama, saved to `directory`; returns the transformers model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | overrides))).eval()
    for name, param in model.named_parameters():
        # Wide weights: text that does not loop, and logits whose argmax rounding does not flip.
        nn.init.normal_(param, mean=float("norm" in name), std=0.3)
    model.save_pretrained(directory)
    return model


def tiny_speculator(directory: Path, seed: int = 0, prefix: str = "speculator.", **overrides):
    """A random speculator checkpoint for `tiny_llama`; returns its config and tensors by name."""
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "emb_dim": 48,
        "inner_dim": 32,
        "n_predict": 3,
        "vocab_size": 97,
        "top_k_tokens_per_head": [4, 3, 2],
        "n_candidates": 5,
    } | overrides
    n, d, v = config["n_predict"], config["emb_dim"], config["vocab_size"]
    w = config["inner_dim"] or d
    g = torch.Generator().manual_seed(seed)
    shapes = {}
    for i in range(n):
        shapes |= {f"emb.{i}.weight": (v, w), f"head.{i}.weight": (v, w)}
        shapes |= {f"ln.{i}.weight": (w,), f"ln.{i}.bias": (w,)}
        shapes |= {f"proj.{i}.weight": (w, w if i else d)}
    tensors = {name: torch.randn(shape, generator=g) * 0.2 for name, shape in shapes.items()}
    if config.get("tie_weights"):
        for name in list(tensors):
            kind, i, *rest = name.split(".")
            first = min(int(i), 1 if kind == "proj" else 0)
            tensors[name] = tensors[".".join([kind, str(first), *rest])]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({prefix + k: t.clone() for k, t in tensors.items()}, directory / "model.safetensors")
    return config, tensors


class Scripted(nn.Module):
    """A speculator that reads its drafts from a script [B, S] of token ids by position.

    With `wrong_every` n > 0, each n-th position is drafted wrong on purpose; 1 is always wrong.
    """

    def __init__(self, script: torch.Tensor, vocab_size: int, wrong_every: int = 0):
        super().__init__()
        self.register_buffer("script", script)
        self.register_buffer("wrong_every", torch.tensor(wrong_every or 10**9))
        self.vocab_size = vocab_size

    def draft(self, hidden, token, position, k, choose=None):
        where = position[:, None] + 1 + torch.arange(k, device=position.device)
        tokens = self.script.gather(1, where.clamp(max=self.script.shape[1] - 1))
        wrong = (where % self.wrong_every == 0).long()
        return (tokens + wrong) % self.vocab_size


def script_for(prompts, answers, max_seq_len=256):
    """The right tokens by row and position."""
    script = torch.zeros(len(prompts), max_seq_len, dtype=torch.int64)
    for row, prompt, answer in zip(script, prompts, answers, strict=True):
        text = (prompt + answer)[:max_seq_len]
        row[: len(text)] = torch.tensor(text)
    return script


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama(directory)
    return directory


@pytest.fixture(scope="session")
def speculator_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("speculator")
    tiny_speculator(directory)
    return directory
