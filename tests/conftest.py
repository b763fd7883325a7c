"""Small random checkpoints and scripted speculators that the tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

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


def tiny_gpt_bigcode(directory: Path, seed: int = 0, **overrides):
    """As `tiny_llama`, a random gpt_bigcode of the same width, heads and vocabulary."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "n_embd": 48, "n_inner": 64, "n_layer": 3, "n_head": 6}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = GPTBigCodeConfig(**(sizes | ends | {"n_positions": 128} | overrides))
    model = GPTBigCodeForCausalLM(config).eval()
    for name, param in model.named_parameters():
        mean, std = float("ln" in name and "weight" in name), 1.0 if "wpe" in name else 0.3
        nn.init.normal_(param, mean=mean, std=std)
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


def store_as_bin(directory: Path, tensors: dict, shards: int = 1) -> None:
    """Put tensors in place of a checkpoint's safetensors: torch's .bin, or shards with an index."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    names = ["pytorch_model.bin"] if shards == 1 else names
    for i, file in enumerate(names):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        torch.save(part, directory / file)
    if shards > 1:
        weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


LOAD_AND_WATCH = """
import sys, threading, time
sys.path.insert(0, "")
from {module} import {load}

def anonymous():  # bytes; pages of mapped files, which the system drops at need, do not count
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.0005)

for directory in sys.argv[1:]:
    done, peaks, before = False, [], anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = {load}(directory)
    done = True
    watcher.join()
    held = sum(p.nbytes for p in model.parameters())
    print(max(peaks) - before - held, held)
    del model
"""


def memory_beside_the_model(module: str, load: str, directories: list[Path]) -> list[tuple]:
    """For each checkpoint: bytes held at the peak of its loading beside the model; the model's.

    The first is loaded once more before, for what torch imports at its first use.
    """
    command = [sys.executable, "-c", LOAD_AND_WATCH.format(module=module, load=load)]
    command += [str(directory) for directory in (directories[0], *directories)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [tuple(map(int, line.split())) for line in result.stdout.splitlines()[1:]]


class Unwanted:
    """Runs code when an unrestricted pickle loads it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# What may lie under the name of a .bin, by a function of its path, and what it is called.
SPARSE, META = torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")
OLD = {"_use_new_zipfile_serialization": False}
NOT_A_ZIP = "cut off or damaged (not a whole zip archive, as torch.save writes since torch 1.6)"
RUNS_CODE = "holds more than tensors, which could run code; use a safetensors file"
BAD_BINS = {
    "empty": (lambda file: file.write_bytes(b""), NOT_A_ZIP),
    "cut_off": (lambda file: file.write_bytes(file.read_bytes()[:-1]), NOT_A_ZIP),
    "git_lfs": (lambda file: file.write_text("version https://git-lfs.github.com/"), NOT_A_ZIP),
    "before_torch_1_6": (lambda file: torch.save({"a": torch.zeros(3)}, file, **OLD), NOT_A_ZIP),
    "no_torch_zip": (lambda file: ZipFile(file, "w").writestr("a", "b"), "cut off or damaged ("),
    "code": (lambda file: torch.save({"a": Unwanted(file.parent / "ran")}, file), RUNS_CODE),
    "module": (lambda file: torch.save(nn.Linear(2, 2), file), RUNS_CODE),
    "list": (lambda file: torch.save([1], file), "expected tensors by name, found list"),
    "nested": (lambda file: torch.save({"model": {}}, file), "'model' is not a plain tensor"),
    "number": (lambda file: torch.save({"epoch": 3}, file), "'epoch' is not a plain tensor"),
    "no_name": (lambda file: torch.save({1: torch.zeros(3)}, file), "1 is not a plain tensor"),
    "sparse": (lambda file: torch.save({"a": SPARSE}, file), "'a' is not a plain tensor"),
    "meta": (lambda file: torch.save({"a": META}, file), "'a' is not a plain tensor"),
}


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
