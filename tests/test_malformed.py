"""Malformed input of every kind through the command line: exit code 1, one line that names what is
wrong, nothing on stdout, nothing executed, and soon.

Other tests ask each module about its own input. Here a checkpoint that works is damaged in one
place, and `main` is asked for an answer.
"""

import gzip
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import BAD_BINS, Unwanted, assert_one_line, run_main, store_as_bin
from safetensors.torch import load_file, save_file

import fastspec
import tokenizer

REPOSITORY = Path(fastspec.__file__).parent
DEEP = b"[" * 200_000
NOT_UTF8 = b'{"model_type": "\xff"}'


# ---- damages: each takes the directory of a checkpoint ----


def write(name, content):
    """The file holds these bytes, or this as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()

    def damage(directory):
        (directory / name).write_bytes(data)

    return damage


def edit(name, *gone, **fields):
    """Fields of a JSON file are gone, or are others."""

    def damage(directory):
        old = json.loads((directory / name).read_text("utf-8"))
        new = {key: value for key, value in old.items() if key not in gone} | fields
        (directory / name).write_text(json.dumps(new))

    return damage


def config(*gone, **fields):
    return edit("config.json", *gone, **fields)


def remove(name):
    return lambda directory: (directory / name).unlink()


def cut(name, keep):
    """Only the first part of a file is there."""

    def damage(directory):
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def tensors(change):
    """`change` has been at the tensors, by name."""

    def damage(directory):
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors")

    return damage


def fill(name, value):
    return tensors(lambda found: found[name].view(-1)[-1:].fill_(value))


def change_type(name, dtype):
    return tensors(lambda found: found.update({name: found[name].to(dtype)}))


def as_bin(*damages, shards=1):
    """The weights are torch's .bin, and damaged."""

    def damage(directory):
        store_as_bin(directory, load_file(directory / "model.safetensors"), shards)
        for each in damages:
            each(directory)

    return damage


def bin_tensors(change):
    def damage(directory):
        found = torch.load(directory / "pytorch_model.bin", weights_only=True)
        torch.save(change(found), directory / "pytorch_model.bin")

    return damage


def sharded(*damages):
    """The weights are two shards with an index, and damaged."""

    def damage(directory):
        found = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        weight_map = {name: SHARDS[i % 2] for i, name in enumerate(sorted(found))}
        for shard in SHARDS:
            save_file({n: found[n] for n in found if weight_map[n] == shard}, directory / shard)
        write(INDEX, {"weight_map": weight_map})(directory)
        for each in damages:
            each(directory)

    return damage


INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
EMBED, NORM, QUERY = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


def header(text):
    """A safetensors file with this header and a little data."""
    return struct.pack("<Q", len(text)) + text.encode() + bytes(8)


TENSOR = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, %d]}}'


def directory_in_place_of(name):
    def damage(directory):
        (directory / name).unlink()
        (directory / name).mkdir()

    return damage


CONFIG = {
    "empty": (write("config.json", b""), "config.json: not valid JSON"),
    "cut off": (cut("config.json", 0.5), "config.json: not valid JSON"),
    "not UTF-8": (write("config.json", NOT_UTF8), "config.json: not valid JSON"),
    "binary": (write("config.json", bytes(range(256))), "config.json: not valid JSON"),
    "UTF-16": (write("config.json", "{}".encode("utf-16")), "config.json: not valid JSON"),
    "with a mark in front": (write("config.json", b"\xef\xbb\xbf{}"), "config.json: not valid"),
    "a list": (write("config.json", []), "config.json: expected a JSON object, found list"),
    "nested without end": (write("config.json", DEEP), "config.json: not valid JSON"),
    "a number of 5000 digits": (
        write("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"),
        "config.json: not valid JSON",
    ),
    "missing": (remove("config.json"), "config.json: no such file"),
    "a directory": (directory_in_place_of("config.json"), "config.json"),
    "no model_type": (config("model_type"), "model_type None is not supported"),
    "another model_type": (config(model_type="mamba"), "model_type 'mamba' is not supported"),
    "a list of model_type": (config(model_type=["llama"]), r"model_type \['llama'\] is not supp"),
    "no hidden_size": (config("hidden_size"), "hidden_size is missing"),
    "hidden_size 10**9": (config(hidden_size=10**9), "hidden_size must be an integer of 1 to"),
    "hidden_size a float": (config(hidden_size=48.0), "hidden_size must be an integer"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers must be an integer of 1 to 1024"),
    "layers 10**6": (config(num_hidden_layers=10**6), "num_hidden_layers must be an integer"),
    "weights beyond memory": (
        config(intermediate_size=2**24, num_hidden_layers=1024),
        r"weights of \d+\.\d GB and a KV cache of .* do not fit into",
    ),
    "heads that do not divide": (config(num_key_value_heads=4), "num_attention_heads 6 is not a"),
    "odd head_dim": (config(head_dim=7), "head_dim 7 is odd"),
    "NaN": (config(rms_norm_eps=math.nan), "rms_norm_eps must be a number above 0"),
    "infinite theta": (
        config("rope_parameters", rope_theta=math.inf),
        "rope_theta must be a number above 0",
    ),
    "another rope": (
        config("rope_parameters", rope_scaling={"type": "yarn", "factor": 2}),
        "rope type 'yarn' is not supported; supported: default, llama3",
    ),
    "rope without its fields": (
        config("rope_parameters", rope_scaling={"type": "llama3"}),
        "rope type 'llama3' needs factor",
    ),
    "rope as text": (config(rope_parameters="llama3"), "rope parameters must be an object"),
    "rope of a type that is a list": (
        config(rope_parameters={"rope_type": ["default"]}),
        r"rope type \['default'\] is not supported",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "an activation that is a list": (config(hidden_act=["silu"]), r"hidden_act \['silu'\] is not"),
    "a flag as text": (config(tie_word_embeddings="false"), "tie_word_embeddings must be true or"),
    "context 1": (config(max_position_embeddings=1), "max_seq_len 1 "),
    "end id as text": (config(eos_token_id="</s>"), "config.json: eos_token_id"),
    "end ids nested": (config(eos_token_id=[[2]]), "config.json: eos_token_id"),
    "end id an object": (config(eos_token_id={"id": 2}), "config.json: eos_token_id"),
    "end id beyond int64": (config(eos_token_id=2**70), "config.json: eos_token_id"),
    "generation_config a list": (write("generation_config.json", [1]), "generation_config.json: e"),
    "generation_config nested": (write("generation_config.json", DEEP), "generation_config.json"),
    "generation end id as text": (
        write("generation_config.json", {"eos_token_id": ["2"]}),
        "generation_config.json: eos_token_id",
    ),
    "too many end ids": (
        write("generation_config.json", {"eos_token_id": [*range(20)]}),
        "end ids; at most 16",
    ),
}

SAFETENSORS = {
    "empty": (write("model.safetensors", b""), "model.safetensors: cut off or damaged"),
    "cut off": (cut("model.safetensors", 0.5), "model.safetensors: cut off or damaged"),
    "cut in the header": (cut("model.safetensors", 0.001), "model.safetensors: cut off or dam"),
    "a pointer of git": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors: cut off or damaged",
    ),
    "header of 2**63 bytes": (
        write("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"),
        "model.safetensors: cut off or damaged",
    ),
    "header no JSON": (write("model.safetensors", header("{{")), "model.safetensors: cut off or"),
    "header not UTF-8": (
        write("model.safetensors", struct.pack("<Q", 4) + b'{"\xff}'),
        "model.safetensors: cut off or damaged",
    ),
    "data beyond the file": (write("model.safetensors", header(TENSOR % 2**40)), "cut off or dam"),
    "data of another size": (write("model.safetensors", header(TENSOR % 4)), "cut off or damaged"),
    "a pickle by that name": (
        lambda d: torch.save({"a": Unwanted(d / "ran")}, d / "model.safetensors"),
        "model.safetensors: cut off or damaged",
    ),
    "missing": (remove("model.safetensors"), "neither model.safetensors nor pytorch_model.bin"),
    "a directory": (directory_in_place_of("model.safetensors"), "model.safetensors"),
    "a tensor missing": (
        tensors(lambda found: found.pop(NORM)),
        "1 tensors missing, first model.norm.weight",
    ),
    "all tensors missing": (tensors(lambda found: found.clear()), "30 tensors missing, first lm_h"),
    "a tensor too many": (
        tensors(lambda found: found.update(extra=torch.zeros(2))),
        "1 unknown tensors, first extra",
    ),
    "a name of two lines": (
        tensors(lambda found: found.update({"a\nb": torch.zeros(2)})),
        "1 unknown tensors, first",
    ),
    "quantised": (change_type(QUERY, torch.int8), "q_proj.weight is torch.int8; supported: fl"),
    "float64": (change_type(EMBED, torch.float64), "embed_tokens.weight is torch.float64; supp"),
    "float8": (change_type(EMBED, torch.float8_e4m3fn), "is torch.float8_e4m3fn; supported"),
    "another shape": (
        tensors(lambda found: found.update({NORM: torch.zeros(47)})),
        r"model.norm.weight has shape \[47\], config.json says \[48\]",
    ),
    "of another config": (config(vocab_size=97), "expects vocabulary 400, target .* has 97"),
    "wider than the config": (config(intermediate_size=65), r"has shape \[64, 48\], config.json"),
    "fewer layers than the config": (config(num_hidden_layers=4), "9 tensors missing, first mod"),
    "NaN": (fill(QUERY, math.nan), "model.layers.1.self_attn.q_proj.weight holds NaN"),
    "infinity": (fill(EMBED, -math.inf), "embed_tokens.weight holds NaN or values beyond"),
    "a shard missing": (sharded(remove(SHARDS[1])), f"{SHARDS[1]} not found"),
    "a shard cut off": (sharded(cut(SHARDS[1], 0.9)), f"{SHARDS[1]}: cut off or damaged"),
    "a shard twice": (
        sharded(lambda d: shutil.copy(d / SHARDS[0], d / SHARDS[1])),
        f"{SHARDS[1]}: .* is also in {SHARDS[0]}",
    ),
    "index no JSON": (sharded(write(INDEX, b"{")), f"{INDEX}: not valid JSON"),
    "index nested": (sharded(write(INDEX, DEEP)), f"{INDEX}: not valid JSON"),
    "index without a map": (sharded(write(INDEX, {})), f"{INDEX}: weight_map is missing"),
    "index with an empty map": (
        sharded(write(INDEX, {"weight_map": {}})),
        "30 tensors missing, first lm_head.weight",
    ),
    "index of files elsewhere": (
        sharded(write(INDEX, {"weight_map": {"a": "../../model.safetensors"}})),
        f"{INDEX}: '../../model.safetensors' is not the name of a .safetensors file",
    ),
    "index of pickles": (
        sharded(write(INDEX, {"weight_map": {"a": "model.pkl"}})),
        f"{INDEX}: 'model.pkl' is not the name of a .safetensors file",
    ),
}


class Greedy:
    """A petabyte when a pickle loads it, made of a type that torch allows."""

    def __reduce__(self):
        return bytearray, (10**15,)


BIN_INDEX = "pytorch_model.bin.index.json"
BIN = {
    name: (
        as_bin(lambda directory, put=put: put(directory / "pytorch_model.bin")),
        re.escape(f"pytorch_model.bin: {message}"),
    )
    for name, (put, message) in BAD_BINS.items()
}
BIN |= {
    "cut in half": (as_bin(cut("pytorch_model.bin", 0.5)), "pytorch_model.bin: cut off or damaged"),
    "a tensor missing": (
        as_bin(bin_tensors(lambda found: {n: found[n] for n in found if n != NORM})),
        "1 tensors",
    ),
    "integers": (
        as_bin(bin_tensors(lambda found: {n: t.int() for n, t in found.items()})),
        "pytorch_model.bin: .* is torch.int32; supported: float16, bfloat16, float32",
    ),
    "NaN": (
        as_bin(bin_tensors(lambda found: {n: t * math.nan for n, t in found.items()})),
        "pytorch_model.bin: .* holds NaN",
    ),
    "a pickle that asks for memory": (
        as_bin(lambda d: torch.save({"a": Greedy()}, d / "pytorch_model.bin")),
        "pytorch_model.bin: cut off or damaged",
    ),
    "code in the second shard": (
        as_bin(
            lambda d: torch.save(
                {"a": Unwanted(d / "ran")}, d / "pytorch_model-00002-of-00002.bin"
            ),
            shards=2,
        ),
        "pytorch_model-00002-of-00002.bin: holds more than tensors, which could run code",
    ),
    "a shard missing": (
        as_bin(remove("pytorch_model-00001-of-00002.bin"), shards=2),
        "pytorch_model-00001-of-00002.bin not found",
    ),
    "index of pickles elsewhere": (
        as_bin(write(BIN_INDEX, {"weight_map": {"a": "/elsewhere/a.bin"}}), shards=2),
        f"{BIN_INDEX}: '/elsewhere/a.bin' is not the name of a .bin file",
    ),
}

SPECULATOR = {
    "config cut off": (cut("config.json", 0.3), "draft/config.json: not valid JSON"),
    "config nested": (write("config.json", DEEP), "draft/config.json: not valid JSON"),
    "config missing": (remove("config.json"), "draft/config.json: no such file"),
    "a target in its place": (config(model_type="llama"), "'llama' is not a speculator"),
    "of another kind": (config(method="sum_lstm"), r"method 'sum_lstm' \(of Arctic's LSTM"),
    "no heads": (config(n_predict=0), "n_predict must be an integer of 1 to 1024"),
    "10**9 heads": (config(n_predict=10**9), "n_predict must be an integer of 1 to 1024"),
    "width as text": (config(inner_dim="32"), "inner_dim must be an integer"),
    "no vocabulary": (config("vocab_size"), "vocab_size is missing"),
    "of another width": (config(emb_dim=64), "expects hidden width 64, target .* has 48"),
    "of another vocabulary": (config(vocab_size=97), "expects vocabulary 97, target .* has 400"),
    "too few of top_k": (config(top_k_tokens_per_head=[4]), "top_k_tokens_per_head must be 3"),
    "top_k as text": (config(top_k_tokens_per_head="432"), "top_k_tokens_per_head must be 3"),
    "candidates below 0": (config(n_candidates=-5), "n_candidates must be an integer"),
    "target as a number": (config(base_model_name_or_path=5), "base_model_name_or_path must be a"),
    "a flag as a number": (config(tie_weights=1), "tie_weights must be true or false, found 1"),
    "beyond memory": (config(inner_dim=2**24), r"weights of \d+\.\d GB and a KV cache"),
    "weights cut off": (cut("model.safetensors", 0.5), "draft/model.safetensors: cut off or"),
    "weights missing": (remove("model.safetensors"), "draft: neither model.safetensors nor"),
    "a tensor missing": (
        tensors(lambda found: found.pop("speculator.ln.1.bias")),
        "draft: 1 tensors missing, first ln.1.bias",
    ),
    "a tensor too many": (
        tensors(lambda found: found.update({"speculator.emb.3.weight": torch.zeros(2)})),
        "draft: 1 unknown tensors, first emb.3.weight",
    ),
    "a tensor with and without prefix": (
        tensors(lambda found: found.update({"ln.1.bias": torch.zeros(32)})),
        "ln.1.bias is also in model.safetensors",
    ),
    "another shape": (config(inner_dim=16), r"has shape \[400, 32\], config.json says \[400, 16\]"),
    "quantised": (change_type("speculator.head.0.weight", torch.int8), "is torch.int8; supported"),
    "NaN": (fill("speculator.head.2.weight", math.nan), "speculator.head.2.weight holds NaN"),
    "ties that differ": (config(tie_weights=True), "differs from the tensor it is tied to"),
    "code": (
        as_bin(lambda d: torch.save({"a": Unwanted(d / "ran")}, d / "pytorch_model.bin")),
        "draft/pytorch_model.bin: holds more than tensors, which could run code",
    ),
    "bin cut off": (
        as_bin(cut("pytorch_model.bin", 0.5)),
        "draft/pytorch_model.bin: cut off or damaged",
    ),
}


def vocabulary(change):
    """`change` has been at tokenizer.json."""

    def damage(directory):
        data = json.loads((directory / "tokenizer.json").read_text("utf-8"))
        change(data)
        (directory / "tokenizer.json").write_text(json.dumps(data))

    return damage


def split(pattern):
    """tokenizer.json cuts text by this regular expression."""
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [step | {"invert": False}, plain]}
    return vocabulary(lambda data: data.update(pre_tokenizer=steps))


def instead(name, content, **beside):
    """Another tokenizer file in place of tokenizer.json."""

    def damage(directory):
        (directory / "tokenizer.json").unlink()
        (directory / name).parent.mkdir(exist_ok=True)
        for file, data in {name: content, **beside}.items():
            write(file, data)(directory)

    return damage


TOKENIZER = {
    "empty": (write("tokenizer.json", b""), "tokenizer.json: not JSON"),
    "cut off": (cut("tokenizer.json", 0.7), "tokenizer.json: not JSON"),
    "not UTF-8": (write("tokenizer.json", NOT_UTF8), "tokenizer.json: not UTF-8 at byte 16"),
    "nested without end": (write("tokenizer.json", DEEP), "tokenizer.json: not JSON"),
    "a list": (write("tokenizer.json", []), "tokenizer.json: holds a JSON list"),
    "another model": (
        vocabulary(lambda data: data["model"].update(type="Unigram")),
        'tokenizer.json: model.type is "Unigram"',
    ),
    "vocabulary a list": (
        vocabulary(lambda data: data["model"].update(vocab=["a"])),
        r'tokenizer.json: model.vocab is \["a"\]; supported: an object',
    ),
    "an id below 0": (
        vocabulary(lambda data: data["model"]["vocab"].update(a=-1)),
        r'model.vocab\["a"\] is -1; supported: an id',
    ),
    "one id twice": (
        vocabulary(lambda data: data["model"]["vocab"].update(a=50, b=50)),
        "model.vocab gives one id to two tokens",
    ),
    "a merge of three": (
        vocabulary(lambda data: data["model"]["merges"].insert(0, ["a", "b", "c"])),
        r"model.merges\[0\] is",
    ),
    "a merge of nothing": (
        vocabulary(lambda data: data["model"]["merges"].insert(0, ["qz", "qz"])),
        r"model.merges\[0\] .* has a part or a result not in model.vocab",
    ),
    "ids beyond the model": (
        vocabulary(lambda data: data["model"]["vocab"].update(W=10**12)),
        r"prompt 0: 1000000000000 is not a token id of 0\.\.399",
    ),
    "a pattern that is none": (split("(a"), "pre_tokenizer Split.pattern is"),
    "a pattern without end": (split("(?=" * 5000), "pre_tokenizer Split.pattern is"),
    "a pattern of exponential time": (
        split(r"(?:[\s\S]|[\S\s]|\S|\s)+!"),
        r"the tokenizer's pattern .* takes over 0.5 s on a text of",
    ),
    "a token that UTF-8 cannot hold": (
        vocabulary(lambda data: data["model"]["vocab"].update({"\ud800": 399})),
        "tokenizer.json: .*surrogates not allowed",
    ),
    "an added token that contradicts": (
        vocabulary(lambda data: data["added_tokens"].append({"id": 5, "content": "x"})),
        r"added_tokens\[3\].id 5 of .x. contradicts another token",
    ),
    "tokenizer_config no JSON": (
        write("tokenizer_config.json", b"{'a': 1}"),
        "tokenizer_config.json: not JSON",
    ),
    "no such end": (
        edit("tokenizer_config.json", eos_token="</s>"),
        'no token "</s>", the eos_token of tokenizer_config.json',
    ),
    "ids that are names": (
        edit("tokenizer_config.json", added_tokens_decoder={"x": {"content": "x"}}),
        r"added_tokens_decoder\[.x.\].id is",
    ),
    "special tokens a number": (
        write("special_tokens_map.json", {"additional_special_tokens": 5}),
        "special_tokens_map.json: additional_special_tokens is 5",
    ),
    "added_tokens not UTF-8": (write("added_tokens.json", NOT_UTF8), "added_tokens.json: not UTF"),
    "added id as text": (write("added_tokens.json", {"x": "1"}), r"added_tokens.json\[.x.\].id is"),
    "tokenizer.model of noise": (
        instead("tokenizer.model", bytes(range(256)) * 9),
        "tokenizer.model: neither a sentencepiece model nor tiktoken ranks",
    ),
    "tokenizer.model a pickle": (
        instead("tokenizer.model", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."),
        "tokenizer.model: neither a sentencepiece model nor tiktoken ranks",
    ),
    "ranks with gaps": (
        instead("original/tokenizer.model", b"IQ== 0\nIg== 2\n"),
        "original/tokenizer.model: the ranks of its 2 lines are not 0 to 1",
    ),
    "ranks no base64": (instead("tokenizer.model", b"IQ== 0\nI= 1\n"), "tokenizer.model: line 2"),
    "vocab.json alone": (instead("vocab.json", {"a": 0}), "merges.txt is missing beside it"),
    "merges not UTF-8": (
        instead("vocab.json", {"a": 0}, **{"merges.txt": b"a \xff\n"}),
        "merges.txt: not UTF-8 at byte 2",
    ),
    "of another kind": (instead("vocab.txt", b"a\n"), "vocab.txt: not supported alone"),
}


def template(text):
    return edit("tokenizer_config.json", chat_template=text)


# What a template would have to reach to run a program; each would leave the file `ran`.
OS = "__globals__['__builtins__']['__import__']('os').system('touch ran')"
HOSTILE = {
    "by a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by a global": "{{ raise_exception." + OS + " }}",
    "by a method": "{{ cycler.__init__." + OS + " }}",
    "by a filter": "{{ (messages | attr('__class__')).mro() }}",
    "by a namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "by an import": "{% import 'os' as os %}{{ os.system('touch ran') }}",
    "by a file": "{% include '/etc/passwd' %}",
    "by a change of the messages": "{{ messages.append(messages) }}",
}
TEMPLATES = {
    "without its end": ("{% for m in messages %}", "TemplateSyntaxError"),
    "of something absent": ("{{ messages[0].absent.absent }}", "UndefinedError"),
    "without end": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "RecursionError",
    ),
    "of a long loop": ("{% for i in range(10 ** 12) %}{% endfor %}", "OverflowError"),
    "of too much text": ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
    "that refuses": ("{{ raise_exception('no\nsystem\nrole') }}", "TemplateError: no system role"),
    "dividing by 0": ("{{ 1 // 0 }}", "ZeroDivisionError"),
}
TEMPLATE = {
    name: (template(text), f"chat template: {message}")
    for name, (text, message) in TEMPLATES.items()
}
TEMPLATE |= {name: (template(text), "chat template: ") for name, text in HOSTILE.items()}
TEMPLATE |= {
    "by a format": (template("{{ '{0.__class__}'.format(messages) }}"), "prompt 0 is empty"),
    "a number": (template(5), "tokenizer_config.json: chat_template is 5"),
    "not UTF-8": (write("chat_template.jinja", b"\xff"), "chat_template.jinja: not UTF-8 at byte"),
    "empty": (template(""), "prompt 0 is empty"),
    "longer than the context": (template("{{ 'a' * 300 }}"), "prompt 0 has 300 tokens, and max_se"),
}

DAMAGES = {
    ("random", "config.json"): CONFIG,
    ("random", "safetensors"): SAFETENSORS,
    ("random", "bin"): BIN,
    ("random", "tokenizer"): TOKENIZER,
    ("random", "chat template"): TEMPLATE,
    ("draft", "speculator"): SPECULATOR,
}
CASES = [
    pytest.param(name, damage, message, id=f"{group}: {case}")
    for (name, group), cases in DAMAGES.items()
    for case, (damage, message) in cases.items()
]


def argv_of(dirs, name, directory):
    changed = {"random": dirs.random, "draft": dirs.draft} | {name: directory}
    return ["--checkpoint", changed["random"], "--speculator", changed["draft"]]


@pytest.mark.parametrize(("name", "damage", "message"), CASES)
def test_a_damaged_checkpoint_is_one_line(capsys, dirs, copy, monkeypatch, name, damage, message):
    """A run takes about 0.1 s; 20 leave room for a busy machine, not for what has no end."""
    directory = copy(name)
    damage(directory)
    capsys.readouterr()  # of the damaging
    monkeypatch.chdir(directory)
    monkeypatch.setattr(tokenizer, "_MOST_SECONDS", 0.5)
    start = time.perf_counter()
    result = run_main(capsys, *argv_of(dirs, name, directory), "--max-new-tokens", 4)
    assert_one_line(result, message)
    assert time.perf_counter() - start < 20
    assert not (directory / "ran").exists()


def test_what_the_damages_start_from_works(capsys, dirs, copy, tmp_path):
    """... in each of the forms of its weights, so that every message above is of the damage."""
    for form in (lambda directory: None, as_bin(), as_bin(shards=2), sharded()):
        for name in ("random", "draft"):
            directory = copy(name)
            form(directory)
            argv = [*argv_of(dirs, name, directory), "--max-new-tokens", 4]
            code, out, err = run_main(capsys, *argv)
            assert (code, len(out) > 1) == (0, True), err
            shutil.rmtree(directory)


def test_the_traps_are_live(tmp_path, monkeypatch):
    """Without the guards the pickle and the templates do run a program."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Unwanted(tmp_path / "ran")}, tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    (tmp_path / "ran").unlink()
    jinja2.Environment().from_string(HOSTILE["by a method"]).render()
    (tmp_path / "ran").unlink()


# ---- files of prompts ----


def packed(text):
    return gzip.compress(text, mtime=0)


PROMPTS = {
    "empty": (b"", "in.jsonl: no row to run"),
    "white space": (b" \n\t\n\r\n", "in.jsonl: no row to run"),
}
ROWS = {
    "compressed": (packed(b'{"prompt": "a"}'), "1: "),
    "NUL bytes": (bytes(100), "1: not JSON"),
    "a table": (b"id,prompt\n", "1: not JSON: Expecting value at column 1"),
    "nested without end": (DEEP, "1: "),
    "10 MB without a line end": (b'{"prompt": [' + b"1, " * 2**20, "1: not JSON"),
    "a number of 5000 digits": (b'{"prompt": [' + b"9" * 5000 + b"]}", "1: "),
    "an id beyond int64": (b'{"prompt": [100000000000000000000]}', "1: the prompt: 1000"),
    "null": (b"null", "1: expected a JSON object, found NoneType"),
    "half of a row": (b'\n\n{"prompt": "a"', "3: not JSON"),
    "a role that is none": (b'{"messages": [{"role": 1, "content": "a"}]}', "1: the conversation"),
    "infinity": (b'{"prompt": "a", "temperature": Infinity}', "1: .*temperature inf is out of"),
}


@pytest.fixture
def prompts(tmp_path):
    def write(data):
        (tmp_path / "in.jsonl").write_bytes(data)
        return ["--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]

    return write


@pytest.mark.parametrize(("data", "message"), PROMPTS.values(), ids=PROMPTS)
def test_a_file_without_rows_is_one_line(capsys, dirs, prompts, data, message):
    assert_one_line(run_main(capsys, "--checkpoint", dirs.random, *prompts(data)), message)


@pytest.mark.parametrize(("data", "message"), ROWS.values(), ids=ROWS)
def test_a_bad_row_is_one_line_and_the_file_another(capsys, dirs, prompts, data, message):
    """The row's names its line in the file."""
    code, out, err = run_main(capsys, "--checkpoint", dirs.random, *prompts(data))
    assert (code, out) == (1, "")
    row, file = err.splitlines()
    assert_one_line((code, out, row + "\n"), f"in.jsonl:{message}")
    assert_one_line((code, out, file + "\n"), "in.jsonl: no row to run")


# ---- options ----

OPTIONS = {
    "checkpoint a file": (["--checkpoint", "in.jsonl"], "in.jsonl: no such directory"),
    "checkpoint of three parts": (["--checkpoint", "a/b/c"], "a/b/c: no such directory, and not a"),
    "checkpoint of two lines": (["--checkpoint", "a\nb"], "a"),
    "checkpoint with a NUL": (["--checkpoint", "a\0b"], "a"),
    "checkpoint of 5000 letters": (["--checkpoint", "a" * 5000], "aaa"),
    "a speculator as checkpoint": (["--checkpoint", "draft"], "model_type 'mlp_speculator' is not"),
    "a checkpoint as speculator": (["--speculator", "random"], "'llama' is not a speculator"),
    "revision of a directory": (["--revision", "main"], "is a directory here: a revision"),
    "output without prompts": (["--output", "x"], "--prompts and --output need each other"),
    "prompts a directory": (["--prompts", "/", "--output", "x"], "/: no such file"),
    "prompts missing": (["--prompts", "absent", "--output", "x"], "absent: no such file"),
    "output a directory": (["--prompts", "in.jsonl", "--output", "/"], "/"),
    "profile a directory": (["--profile", "/"], "/"),
    "device": (["--device", "tpu"], "device 'tpu' is not supported"),
    "temperature NaN": (["--temperature", "nan"], "temperature nan is out of range"),
    "temperature infinite": (["--temperature", "inf"], "temperature inf is out of range"),
    "top-p NaN": (["--top-p", "nan"], "top_p nan is out of range"),
    "min-p below 0": (["--min-p", "-0.1"], "min_p -0.1 is out of range"),
    "top-k 10**12": (["--top-k", 10**12], "top_k 1000000000000 is out of range"),
    "tokens 10**12": (["--max-new-tokens", 10**12], "max_tokens 1000000000000 is out of range"),
    "context 10**12": (["--max-seq-len", 10**12], "max_seq_len 1000000000000 "),
    "context 1": (["--max-seq-len", 1], "max_seq_len 1 is out of range: at least 1 row and 2"),
    "rows 10**12": (["--batch-size", 10**12], "batch_size 1000000000000 "),
    "drafts 99": (["--num-draft-tokens", 99], "cannot draft 99 tokens: speculator .* has 3 heads"),
    "prompt beyond the context": (["--prompt", "a" * 10**6], "prompt 0 has .* tokens, and max_seq"),
    "prompt empty": (["--no-chat", "--prompt", ""], "prompt 0 is empty"),
    "a conversation without template": (["--interactive", "--no-chat"], "leave out --no-chat"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_one_line(capsys, dirs, prompts, tmp_path, monkeypatch, options, message):
    prompts(b'{"prompt": "a"}')
    monkeypatch.chdir(tmp_path)
    for name in ("random", "draft"):
        Path(name).symlink_to(getattr(dirs, name))
    base = ["--checkpoint", dirs.random, "--speculator", dirs.draft]
    assert_one_line(run_main(capsys, *base, *options), message)


# ---- in a process of its own ----


SPRUNG = {
    "a pickle": ("draft", SPECULATOR["code"]),
    "a template": ("random", TEMPLATE["by a global"]),
    "a config": ("random", CONFIG["nested without end"]),
}


@pytest.mark.parametrize(("name", "case"), SPRUNG.values(), ids=SPRUNG)
def test_as_a_script_it_is_one_line_on_stderr(dirs, copy, name, case):
    """Exit code 1 and no traceback, whatever Python and torch would print by themselves."""
    damage, message = case
    directory = copy(name)
    damage(directory)
    argv = [*map(str, argv_of(dirs, name, directory)), "--device", "cpu"]
    command = [sys.executable, str(REPOSITORY / "fastspec.py"), *argv]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert_one_line((done.returncode, done.stdout, done.stderr), message)
    assert not (directory / "ran").exists()
