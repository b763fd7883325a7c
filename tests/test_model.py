"""model.py against transformers and against itself: chunks, ragged rows, trees; bad checkpoints."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    BAD_BINS,
    BAD_INDEXES,
    INDEX,
    TINY,
    memory_beside_the_model,
    store_as_bin,
    tiny_gpt_bigcode,
    tiny_llama,
)
from safetensors.torch import load_file, save_file

import model as module
from model import (
    ModelArgs,
    RopeScaling,
    Transformer,
    forward_in_place,
    kv_cache_shape,
    load_model,
    rope_angles,
    write_cache,
)

# Float32 against float32 in another order of operations: each result rounds by about 6e-8, some
# thirty in a row, so 1e-6 is seen; a wrong formula (norm eps, rope half, head order) gives > 1e-3.
FLOAT32 = 1e-4

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that 48 positions meet kept, interpolated and stretched wavelengths alike.
    "original_max_position_embeddings": 32,
}
CONFIG = {key: value for key, value in TINY.items() if "token_id" not in key}
CONFIG["model_type"] = "llama"


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random_tokens(*shape, seed=1):
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def garbage_cache(model, rows, slots):
    """A cache whose every slot would ruin the result if it were seen."""
    g = torch.Generator().manual_seed(2)
    shape = kv_cache_shape(model.args, rows, slots)
    return (torch.randn(shape, generator=g) * 1e4).to(model.embed.weight.dtype)


def forward(model, tokens, kv=None, cached=None, **kwargs):
    """A plain chain of tokens [B, N] after `cached` [B] slots; returns hidden states and kv."""
    rows, n = tokens.shape
    kv = garbage_cache(model, rows, 8) if kv is None else kv
    cached = torch.zeros(rows, dtype=torch.long) if cached is None else cached
    chain = torch.ones(n, n, dtype=torch.bool).tril()
    return model(tokens, cached[:, None] + torch.arange(n), kv, cached, chain, **kwargs)


def full_logits(model, tokens):
    return model.logits(forward(model, tokens)[0])


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture
def copy(llama_dir, tmp_path):
    """A checkpoint that the test may damage."""
    return shutil.copytree(llama_dir, tmp_path / "copy")


@pytest.fixture(scope="module")
def tiny(llama_dir):
    return load_model(llama_dir)


@pytest.fixture(scope="module", params=["llama", "gpt_bigcode"])
def either(request, tmp_path_factory):
    """A tiny model of each architecture."""
    directory = tmp_path_factory.mktemp(request.param)
    {"llama": tiny_llama, "gpt_bigcode": tiny_gpt_bigcode}[request.param](directory)
    return load_model(directory)


@pytest.fixture(scope="module")
def sharded_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    tiny_llama(directory / "whole").save_pretrained(directory, max_shard_size="40KB")
    return directory


# --- parity with transformers ------------------------------------------------------------------

PARITY = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 20},  # 6 heads of 20 from a width of 48
    "head_dim_80": {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "tied_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "norm_eps": {"rms_norm_eps": 0.1},  # as large as the mean squares it is added to
    "theta_1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
}


GPT_BIGCODE = {
    "gpt_bigcode": {},
    "gpt_bigcode_n_inner": {"n_inner": None},  # 4 * n_embd
    "gpt_bigcode_gelu": {"activation_function": "gelu"},
    "gpt_bigcode_gelu_new": {"activation_function": "gelu_new"},
    "gpt_bigcode_norm_eps": {"layer_norm_epsilon": 0.1},
    "gpt_bigcode_untied": {"tie_word_embeddings": False},
    "gpt_bigcode_one_head": {"n_head": 1},
    "gpt_bigcode_head_dim_3": {"n_head": 16},  # odd: there is no rope to mind
}


@pytest.mark.parametrize("case", PARITY | GPT_BIGCODE)
def test_logits_equal_transformers(case, tmp_path):
    build = tiny_llama if case in PARITY else tiny_gpt_bigcode
    theirs = build(tmp_path, **(PARITY | GPT_BIGCODE)[case])
    tokens = random_tokens(2, 48)
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = full_logits(load_model(tmp_path), tokens)
    assert got.dtype == torch.float32
    assert relative_error(got, expected) < FLOAT32


def test_rope_parity_cases_are_not_idle():
    """Their settings move every frequency but the first, which every theta leaves at 1."""
    default = ModelArgs.from_config(CONFIG)
    for rope in ("theta_1e6", "llama3"):
        args = ModelArgs.from_config(CONFIG | PARITY[rope])
        change = module.rope_frequencies(args) / module.rope_frequencies(default) - 1
        assert change[1:].abs().min() > 0.1


ROPE_STYLES = {
    "rope_parameters": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "theta_outside": {"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "rope_scaling": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "type": {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "both": {  # as when rope_scaling is written into a newer config
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    },
}


@pytest.mark.parametrize("style", ROPE_STYLES)
def test_every_style_of_rope_config_equals_transformers(style, tmp_path):
    theirs = tiny_llama(tmp_path, **PARITY["llama3"])
    edit_json(tmp_path / "config.json", lambda config: config.pop("rope_parameters"))
    edit_json(tmp_path / "config.json", lambda config: config.update(ROPE_STYLES[style]))
    if style == "both":
        theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random_tokens(1, 48)
    with torch.no_grad():
        expected = theirs(tokens).logits
    model = load_model(tmp_path)
    assert model.args.rope_scaling == RopeScaling(**LLAMA3)
    assert relative_error(full_logits(model, tokens), expected) < FLOAT32


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_rope_without_scaling(scaling):
    args = ModelArgs.from_config(CONFIG | {"rope_theta": 1e6, "rope_scaling": scaling})
    assert (args.rope_theta, args.rope_scaling) == (1e6, None)


def test_gpt_bigcode_defaults_are_those_of_transformers():
    from transformers import GPTBigCodeConfig

    config = {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 97}
    args = ModelArgs.from_config(config | {"model_type": "gpt_bigcode"})
    theirs = GPTBigCodeConfig(**config)
    assert (args.n_kv_heads, args.head_dim) == (theirs.num_key_value_heads, 8)
    assert (args.norm_eps, args.ffn_dim) == (theirs.layer_norm_epsilon, 4 * 48)
    assert (args.activation, args.max_position) == (theirs.activation_function, theirs.n_positions)
    assert args.tie_embeddings == theirs.tie_word_embeddings


def test_defaults_are_those_of_transformers():
    """A config.json with only the required fields means what LlamaConfig takes it to mean."""
    from transformers import LlamaConfig

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {key: CONFIG[key] for key in (*sizes, "vocab_size")}
    args, theirs = ModelArgs.from_config(config | {"model_type": "llama"}), LlamaConfig(**config)
    assert (args.n_kv_heads, args.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert args.norm_eps == theirs.rms_norm_eps
    assert args.rope_theta == theirs.rope_parameters["rope_theta"]
    assert args.attention_bias == theirs.attention_bias
    assert args.mlp_bias == theirs.mlp_bias
    assert args.tie_embeddings == theirs.tie_word_embeddings
    assert args.max_position == theirs.max_position_embeddings


# --- the published targets ---------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
LLAMA2 = LLAMA | {"rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False}
LLAMA3_BASE = LLAMA2 | {"rope_theta": 500000.0, "max_position_embeddings": 8192}
GRANITE_CODE = LLAMA2 | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}


def sizes(hidden, layers, heads, kv_heads, ffn, vocab):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
    }


# The targets of IBM's nine accelerators: fields of their config.json, args, and parameters in
# billions to as many digits as are known.
BASES = {
    "Llama-2-13b-chat-hf": (
        LLAMA2 | sizes(5120, 40, 40, 40, 13824, 32000) | {"max_position_embeddings": 4096},
        ModelArgs(5120, 40, 40, 40, 128, 13824, 32000, 1e-5, max_position=4096),
        "13.015864320",
    ),
    "Llama-2-70b-chat-hf": (
        LLAMA2 | sizes(8192, 80, 64, 8, 28672, 32000) | {"max_position_embeddings": 4096},
        ModelArgs(8192, 80, 64, 8, 128, 28672, 32000, 1e-5, max_position=4096),
        "68.976648192",
    ),
    "CodeLlama-34b-Instruct-hf": (
        LLAMA2
        | sizes(8192, 48, 64, 8, 22016, 32000)
        | {"rope_theta": 1000000, "max_position_embeddings": 16384},
        ModelArgs(8192, 48, 64, 8, 128, 22016, 32000, 1e-5, 1e6, max_position=16384),
        "33.743970304",
    ),
    "Meta-Llama-3-8B-Instruct": (
        LLAMA3_BASE | sizes(4096, 32, 32, 8, 14336, 128256),
        ModelArgs(4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, max_position=8192),
        "8.030261248",
    ),
    "Meta-Llama-3-70B-Instruct": (
        LLAMA3_BASE | sizes(8192, 80, 64, 8, 28672, 128256),
        ModelArgs(8192, 80, 64, 8, 128, 28672, 128256, 1e-5, 5e5, max_position=8192),
        "70.553706496",
    ),
    "granite-3b-code-instruct": (  # head_dim 80
        GRANITE_CODE | sizes(2560, 32, 32, 32, 10240, 49152) | {"max_position_embeddings": 2048},
        ModelArgs(
            *(2560, 32, 32, 32, 80, 10240, 49152, 1e-5),
            attention_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
        ),
        "3.48",
    ),
    "granite-8b-code-instruct": (
        GRANITE_CODE | sizes(4096, 36, 32, 8, 14336, 49152) | {"max_position_embeddings": 4096},
        ModelArgs(
            *(4096, 36, 32, 8, 128, 14336, 49152, 1e-5),
            attention_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
            max_position=4096,
        ),
        "8.05",
    ),
    "granite-7b-instruct": (  # 8 tokens more than Llama 2; the first config had no architectures
        LLAMA2
        | sizes(4096, 32, 32, 32, 11008, 32008)
        | {"max_position_embeddings": 4096, "architectures": None},
        ModelArgs(4096, 32, 32, 32, 128, 11008, 32008, 1e-5, max_position=4096),
        "6.738",
    ),
    "granite-20b-code-instruct": (
        {
            "architectures": ["GPTBigCodeForCausalLM"],
            "model_type": "gpt_bigcode",
            "activation_function": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-5,
            "multi_query": True,
            "n_embd": 6144,
            "n_head": 48,
            "n_inner": 24576,
            "n_layer": 52,
            "n_positions": 8192,
            "scale_attn_weights": True,
            "vocab_size": 49152,
        },
        ModelArgs(
            *(6144, 52, 48, 1, 128, 24576, 49152, 1e-5),
            attention_bias=True,
            mlp_bias=True,
            tie_embeddings=True,
            max_position=8192,
            activation="gelu_pytorch_tanh",
            layer_norm=True,
            learned_positions=True,
            model_type="gpt_bigcode",
        ),
        "20.07",
    ),
}


def on_meta(args):
    with torch.device("meta"):
        return Transformer(args)


@pytest.mark.parametrize("name", BASES)
def test_published_configs_and_sizes(name):
    config, args, billions = BASES[name]
    config = {key: value for key, value in config.items() if value is not None}
    assert ModelArgs.from_config(config) == args
    count = sum(p.numel() for p in on_meta(args).parameters())
    assert f"{count / 1e9:.{len(billions.partition('.')[2])}f}" == billions


@pytest.mark.parametrize("name", BASES)
def test_published_tensor_names_and_shapes_are_those_of_transformers(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    config, args, _ = BASES[name]
    layers = {"n_layer" if "n_layer" in config else "num_hidden_layers": 2}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | layers))
    ours = module.hf_tensors(on_meta(replace(args, n_layers=2)))
    expected = {name: p.shape for name, p in theirs.named_parameters()}  # tied ones once
    assert {name: t.shape for name, t in ours.items()} == expected


# --- the cache, ragged rows and trees ----------------------------------------------------------


@pytest.mark.parametrize("chunks", [(24,), (8, 8, 8), (5, 3, 1, 15), (1,) * 24], ids=str)
def test_prefill_in_chunks_equals_one_pass(either, chunks):
    tokens = random_tokens(2, 24)
    expected, expected_kv = forward(either, tokens)
    kv, done, got = garbage_cache(either, 2, 30), torch.zeros(2, dtype=torch.long), []
    for part in tokens.split(chunks, dim=1):
        hidden, new_kv = forward(either, part, kv, done)
        write_cache(kv, new_kv, done[:, None] + torch.arange(part.shape[1]))
        done = done + part.shape[1]
        got.append(hidden)
    assert relative_error(torch.cat(got, dim=1), expected) < FLOAT32
    assert relative_error(kv[..., :24, :], expected_kv) < FLOAT32


def test_ragged_rows_see_only_their_own_cached_slots(either):
    """Rows advance by different amounts, as after accepted drafts; what lies beyond is garbage."""
    tokens, kv = random_tokens(3, 40), garbage_cache(either, 3, 40)
    expected, new_kv = forward(either, tokens)
    cached = torch.tensor([0, 5, 11])
    for row, n in enumerate(cached):
        kv[:, :, row, :, :n] = new_kv[:, :, row, :, :n]
    for accepted in ([4, 1, 3], [1, 1, 1], [2, 4, 1], [3, 2, 4]):
        where = cached[:, None] + torch.arange(4)
        hidden, new_kv = forward(either, tokens.gather(1, where), kv, cached)
        want = torch.stack([expected[row, slots] for row, slots in enumerate(where)])
        assert relative_error(hidden, want) < FLOAT32
        write_cache(kv, new_kv, where)
        cached = cached + torch.tensor(accepted)
        for row, n in enumerate(cached):
            kv[:, :, row, :, n:] = -1e4


def test_write_cache_changes_the_given_slots_alone(either):
    kv = garbage_cache(either, 2, 9)
    new_kv = torch.randn(kv_cache_shape(either.args, 2, 3), generator=torch.Generator())
    slots, expected = torch.tensor([[4, 0, 7], [8, 1, 2]]), kv.clone()
    for row in range(2):
        for n in range(3):
            expected[:, :, row, :, slots[row, n]] = new_kv[:, :, row, :, n]
    write_cache(kv, new_kv, slots)
    assert torch.equal(kv, expected)


PARENTS = [None, 0, 0, 1, 1, 2, 5]  # two branches under the root, two siblings under node 1


def path_to(node):
    return [] if node is None else [*path_to(PARENTS[node]), node]


def test_each_tree_node_equals_its_own_path_as_a_chain(either):
    nodes, cached = len(PARENTS), torch.tensor([6, 9])
    prompt, tree = random_tokens(2, 9), random_tokens(2, nodes, seed=3)
    kv = garbage_cache(either, 2, 12)
    kv[..., :9, :] = forward(either, prompt)[1]
    ancestors = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node in range(nodes):
        ancestors[node, path_to(node)] = True
    depth = torch.tensor([len(path_to(node)) - 1 for node in range(nodes)])
    hidden, new_kv = either(tree, cached[:, None] + depth, kv, cached, ancestors)
    for node in range(nodes):
        alone, alone_kv = forward(either, tree[:, path_to(node)], kv, cached)
        assert relative_error(hidden[:, node], alone[:, -1]) < FLOAT32
        assert relative_error(new_kv[..., node, :], alone_kv[..., -1, :]) < FLOAT32


def attention_by_hand(qkv, kv, cached, ancestors, mask):
    """One query at a time over exactly the keys that `cached` and `ancestors` let it see."""
    K = kv.shape[2]
    q, k, v = qkv.split((qkv.shape[2] - 2 * K, K, K), dim=2)
    y, group = torch.empty_like(q), q.shape[2] // K
    for b, n, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g, own = h // group, ancestors[n]
        keys = torch.cat((kv[0, b, g, : cached[b]], k[b, own, g])).double()
        values = torch.cat((kv[1, b, g, : cached[b]], v[b, own, g])).double()
        weights = (keys @ q[b, n, h].double() / math.sqrt(q.shape[3])).softmax(0)
        y[b, n, h] = weights @ values
    return y


def test_attend_replaces_the_attention_of_every_layer(either):
    """... with arguments from which one written by hand gives the same result."""
    tokens, kv, cached = random_tokens(2, 5), garbage_cache(either, 2, 7), torch.tensor([2, 4])
    kv[..., :4, :] = forward(either, random_tokens(2, 4, seed=4))[1]
    calls = []

    def attend(*args):
        calls.append(args)
        return attention_by_hand(*args)

    got = forward(either, tokens, kv, cached, attend=attend)
    assert len(calls) == either.args.n_layers
    for a, b in zip(got, forward(either, tokens, kv, cached), strict=True):
        assert relative_error(a, b) < FLOAT32


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("live", [0, 4])
def test_one_row_may_be_written_to_the_cache_at_once(either, live, nodes):
    """A tree of tokens, whose keys and values are put after the `live` slots, and nowhere else."""
    tokens, kv, cached = random_tokens(1, nodes), garbage_cache(either, 1, 9), torch.tensor([live])
    kv[..., :4, :] = forward(either, random_tokens(1, 4, seed=4))[1]
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()[:nodes, :nodes]
    positions, before = torch.tensor([[live, live + 1, live + 1]])[:, :nodes], kv.clone()
    expected, new_kv = either(tokens, positions, kv[..., :live, :], cached, tree)
    got = forward_in_place(either, tokens, positions, kv, live, tree)
    assert torch.equal(got, expected)  # all is added in one order
    assert torch.equal(kv[..., live : live + nodes, :], new_kv)
    kv[..., live : live + nodes, :] = before[..., live : live + nodes, :]
    assert torch.equal(kv, before)


# --- dtypes, shards, what a checkpoint may hold ------------------------------------------------


def test_bfloat16_model_is_as_close_to_float32_as_that_of_transformers(tiny, llama_dir):
    from transformers import LlamaForCausalLM

    half, tokens = load_model(llama_dir, dtype=torch.bfloat16), random_tokens(2, 24)
    theirs = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    expected, got = full_logits(tiny, tokens), full_logits(half, tokens)
    with torch.no_grad():
        usual = relative_error(theirs(tokens).logits, expected)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert got.dtype == torch.float32
    # Both round to 8 bits (2^-9 = 0.2 %) some fifty times, not at the same places, and these wide
    # weights amplify it to 3 to 4 %; over 4,656 logits two such errors differ by far less than
    # half. Unrelated logits are 140 % apart.
    assert 0 < relative_error(got, expected) < 1.5 * usual < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_angles_are_float32_whatever_the_dtype(llama_dir, dtype):
    model, position = load_model(llama_dir, dtype=dtype), 4000
    half = model.args.head_dim // 2
    angles = [position * model.args.rope_theta ** (-i / half) for i in range(half)]
    angles = [-angle for angle in angles] + angles  # as `apply_rope` takes the sine
    cos, sin = rope_angles(torch.tensor([[position]]), model.inv_freq, dtype)
    for got, function in ((cos, math.cos), (sin, math.sin)):
        want = torch.tensor([function(angle) for angle in angles])
        # Float32 rounds an angle of 4000 by 2.4e-4, and its frequency by as much again; a 16-bit
        # result rounds by up to 2^-9. A 16-bit frequency would be off by whole turns.
        assert got.dtype == dtype
        assert (got.flatten().float() - want).abs().max() < 2**-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_checkpoint_loads_as_its_rounded_values(copy, dtype):
    def store(change):
        edit_tensors(copy, lambda tensors: tensors.update({n: change(tensors[n]) for n in tensors}))
        return load_model(copy)

    small = store(lambda tensor: tensor.to(dtype))
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert_same_weights(small, store(lambda tensor: tensor.float()))


def test_a_sharded_checkpoint_equals_the_single_file(sharded_dir, tiny):
    assert len(list(sharded_dir.glob("model-*.safetensors"))) > 3
    assert_same_weights(load_model(sharded_dir), tiny)


def test_loaded_models_are_for_inference(tiny):
    assert not tiny.training
    assert not any(p.requires_grad for p in tiny.parameters())


@pytest.mark.parametrize("directory", ["llama_dir", "sharded_dir"])
def test_progress_wraps_the_names_of_all_tensors(directory, request):
    directory, seen = request.getfixturevalue(directory), []
    load_model(directory, progress=lambda names: (seen.append(name) or name for name in names))
    stored = [name for file in directory.glob("*.safetensors") for name in load_file(file)]
    assert sorted(seen) == sorted(stored)


def test_old_inv_freq_tensors_are_tolerated(copy, tiny):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    edit_tensors(copy, lambda tensors: tensors.update(extra))
    assert_same_weights(load_model(copy), tiny)


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_gpt_bigcode])
def test_a_tied_checkpoint_may_hold_either_name_or_both(tmp_path, tiny):
    """Of one matrix: with two that differ, which of them counts is for the user to say."""
    tiny(tmp_path, **({"tie_word_embeddings": True} if tiny is tiny_llama else {}))
    alone = load_model(tmp_path)
    (name,) = (
        name
        for name in load_file(tmp_path / "model.safetensors")
        if name.endswith(("embed_tokens.weight", "wte.weight"))
    )
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[name].clone()}))
    for only_head in (False, True):
        if only_head:
            edit_tensors(tmp_path, lambda t: t.pop(name))
        model = load_model(tmp_path)
        assert_same_weights(model, alone)
        assert model.output.weight.data_ptr() == model.embed.weight.data_ptr()
    bad = torch.full_like(alone.output.weight, torch.nan)
    good = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": bad}))
    with pytest.raises(ValueError, match="holds NaN"):
        load_model(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": good, name: good + 1}))
    words = f"lm_head.weight differs from {name}, to which config.json ties it; set tie_word_embedd"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_model(tmp_path)


def test_memory_is_taken_once_for_each_parameter(tmp_path, monkeypatch):
    """Tied embeddings are one, of 600 MB in granite-20b-code."""
    tiny_gpt_bigcode(tmp_path)
    empty_like, taken = torch.empty_like, []

    def spy(tensor, **options):
        taken.append(tensor.nbytes)
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", spy)
    model = load_model(tmp_path)
    assert sum(taken) == sum(p.nbytes for p in model.parameters()) + model.inv_freq.nbytes


# --- torch's .bin ------------------------------------------------------------------------------


def as_bin(directory, shards=1, change=lambda tensors: None):
    """Store the checkpoint's tensors as .bin, after `change`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    store_as_bin(directory, tensors, shards)


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_equals_safetensors(shards, copy, tiny):
    as_bin(copy, shards)
    assert not list(copy.glob("*.safetensors"))
    assert_same_weights(load_model(copy), tiny)


def test_safetensors_are_preferred(copy, tiny):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (copy / name).write_text("neither is read")
    assert_same_weights(load_model(copy), tiny)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt_bigcode])
def test_a_state_dict_with_every_alias_loads(build, tmp_path):
    """As training code stores it: tied embeddings twice, over one memory."""
    tensors = build(tmp_path, tie_word_embeddings=True).state_dict()
    expected = load_model(tmp_path)
    embed = next(iter(tensors.values()))
    assert tensors["lm_head.weight"].data_ptr() == embed.data_ptr()
    store_as_bin(tmp_path, tensors)
    assert_same_weights(load_model(tmp_path), expected)


def test_parameters_and_views_in_a_bin_load_as_their_values(copy, tiny):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = torch.nn.Parameter(tensor.t().contiguous().t())

    as_bin(copy, change=change)
    model = load_model(copy)
    assert_same_weights(model, tiny)
    assert not any(p.requires_grad or p.grad_fn for p in model.parameters())


def test_old_buffers_in_a_bin_are_tolerated(tmp_path):
    """The masks of old gpt_bigcode checkpoints, of whatever type."""
    tensors = dict(tiny_gpt_bigcode(tmp_path).state_dict())
    expected = load_model(tmp_path)
    for i in range(3):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=torch.float64)
    store_as_bin(tmp_path, tensors)
    assert_same_weights(load_model(tmp_path), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_needs_room_for_one_tensor_beside_the_model(tmp_path):
    """... and not for the file: 55 MB, as is the model, of which no tensor has over 9 MB."""
    wide = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 4096}
    tiny_llama(tmp_path / "safetensors", num_attention_heads=4, **wide)
    shutil.copytree(tmp_path / "safetensors", tmp_path / "bin")
    as_bin(tmp_path / "bin")
    directories = [tmp_path / "safetensors", tmp_path / "bin"]
    for extra, held in memory_beside_the_model("model", "load_model", directories):
        assert held > 55e6
        assert extra < 9e6


# --- errors ------------------------------------------------------------------------------------


def never(names):
    pytest.fail("a weight was about to be copied")


def assert_refused(directory, message, monkeypatch):
    """ValueError with `message`, before memory is taken and before any weight is copied."""
    monkeypatch.setattr(Transformer, "to_empty", lambda *args, **kwargs: never(args))
    monkeypatch.setattr(module, "copy_tensors", lambda *args: never(args))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(directory, progress=never)


LINEAR, DYNAMIC = {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}
NUMBER = "a number above 0, at most 1e30"
KNOWN = "supported: llama, gpt_bigcode"
BAD_CONFIGS = [
    ({"model_type": "mistral"}, f"model_type 'mistral' is not supported; {KNOWN}"),
    ({"model_type": None}, f"model_type None is not supported; {KNOWN}"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
    ({"rope_scaling": LINEAR}, "rope type 'linear' is not supported; supported: default, llama3"),
    ({"rope_scaling": DYNAMIC}, "rope type 'dynamic' is not supported; supported: default, llama3"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
    ({"rope_parameters": [1]}, "rope parameters must be an object, found [1]"),
    ({"rope_theta": -1}, f"rope_theta must be {NUMBER}, found -1"),
    ({"rope_theta": 10**400}, f"rope_theta must be {NUMBER}, found 1000"),
    ({"rms_norm_eps": "x"}, f"rms_norm_eps must be {NUMBER}, found 'x'"),
    ({"rms_norm_eps": float("nan")}, f"rms_norm_eps must be {NUMBER}, found nan"),
    ({"rms_norm_eps": float("inf")}, f"rms_norm_eps must be {NUMBER}, found inf"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 0}}, f"factor must be {NUMBER}"),
    (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1e-9}},
        "low_freq_factor must be below high_freq_factor",
    ),
    ({"head_dim": 7}, "head_dim 7 is odd; rope needs pairs"),
    ({"attention_bias": "false"}, "attention_bias must be true or false, found 'false'"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, found 1"),
    ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads"),
]
BIGCODE = {
    "model_type": "gpt_bigcode",
    "n_embd": 48,
    "n_head": 6,
    "n_layer": 3,
    "n_positions": 128,
    "n_inner": 64,
    "vocab_size": 97,
}
BAD_BIGCODE = [
    ({"multi_query": False}, "multi_query false is not supported; supported: true"),
    ({"scale_attn_weights": False}, "scale_attn_weights false is not supported; supported: true"),
    ({"activation_function": "relu"}, "activation_function 'relu' is not supported; supported: "),
    ({"activation_function": ["gelu"]}, "activation_function ['gelu'] is not supported"),
    ({"n_head": 5}, "n_embd 48 is not a multiple of n_head 5"),
    ({"layer_norm_epsilon": 0}, f"layer_norm_epsilon must be {NUMBER}, found 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, found 'yes'"),
    *(({key: None}, f"{key} is missing") for key in ("n_embd", "n_head", "n_layer", "vocab_size")),
    *(
        ({key: value}, f"{key} must be an integer of 1 to {most}, found {value!r}")
        for keys, most in {("n_head", "n_layer"): 1024, ("n_embd", "n_positions"): 2**24}.items()
        for value in (0, -1, 48.0, "48", True, 10**9)
        for key in keys
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_BIGCODE, ids=lambda x: str(x)[:40])
def test_unsupported_gpt_bigcode_configs_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        ModelArgs.from_config(BIGCODE | change)


INTEGERS = [
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"),
]
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")  # of modules, of rows


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=lambda x: str(x)[:40])
def test_unsupported_configs_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {message}")):
        ModelArgs.from_config(CONFIG | change)


@pytest.mark.parametrize("field", LLAMA3)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling_needs_every_field(field, key):
    rope = {"rope_type": "llama3", **LLAMA3}
    del rope[field]
    with pytest.raises(ValueError, match=f"config.json: rope type 'llama3' needs {field}$"):
        ModelArgs.from_config(CONFIG | {key: rope})


NOT_SIZES = [0, -1, 48.0, "48", True, [48], 10**9, 2**40, 10**400, math.inf, math.nan]


@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("field", INTEGERS)
def test_sizes_must_be_integers_of_a_sane_size(field, value):
    """Refused as numbers: to build 10**9 layers, even without memory, would take minutes."""
    most = 1024 if field in COUNTS else 2**24
    message = f"config.json: {field} must be an integer of 1 to {most}, found {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ModelArgs.from_config(CONFIG | {field: value})


def test_the_largest_numbers_that_pass_take_neither_memory_nor_minutes(copy, monkeypatch):
    largest = {name: 1024 if name in COUNTS else 2**24 for name in INTEGERS}
    edit_json(copy / "config.json", lambda config: config.update(largest))
    layers = "model.layers.10.input_layernorm.weight"  # as text, the first after the file's three
    assert_refused(copy, f"{copy}: 9189 tensors missing, first {layers}", monkeypatch)


@pytest.mark.parametrize("field", [field for field in INTEGERS if field not in OPTIONAL])
def test_missing_fields_are_named(field):
    without = {key: value for key, value in CONFIG.items() if key != field}
    for config in (without, CONFIG | {field: None}):
        with pytest.raises(ValueError, match=f"^config.json: {field} is missing$"):
            ModelArgs.from_config(config)


CONFIG_FILES = {
    "absent": (None, "config.json: no such file; is this a model directory?"),
    "not_json": (b'{"model_type": ', "config.json: not valid JSON ("),
    "not_utf8": (b'{"model_type": "\xff"}', "config.json: not valid JSON ("),
    "not_an_object": (b'["llama"]', "config.json: expected a JSON object, found list"),
    "unsupported": (b'{"model_type": "gpt2"}', "config.json: model_type 'gpt2' is not supported"),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_bad_config_file_is_named(case, copy, monkeypatch):
    content, message = CONFIG_FILES[case]
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_bytes(content)
    assert_refused(copy, message, monkeypatch)


@pytest.mark.parametrize("keep", [-1, -9000, 1000, 4, 0])
def test_a_truncated_file_is_named(keep, copy, monkeypatch):
    """Cut in the last tensor, further up, inside the header, inside its length, to nothing."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(copy, f"{file}: cut off or damaged (", monkeypatch)


def test_a_truncated_shard_is_named(sharded_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(sharded_dir, tmp_path / "copy")
    file = sorted(copy.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(copy, f"{file}: cut off or damaged (", monkeypatch)


def test_a_missing_single_file_is_named(copy, monkeypatch):
    (copy / "model.safetensors").unlink()
    message = f"{copy}: neither model.safetensors nor pytorch_model.bin found; download it again"
    assert_refused(copy, message, monkeypatch)


def test_all_missing_shards_are_named(sharded_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(sharded_dir, tmp_path / "copy")
    gone = sorted(copy.glob("*.safetensors"))[1:3]
    for file in gone:
        file.unlink()
    names = ", ".join(file.name for file in gone)
    assert_refused(copy, f"{copy}: {names} not found; download it again", monkeypatch)


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_named(case, copy, monkeypatch):
    text, message = BAD_INDEXES[case]
    (copy / INDEX).write_text(text)
    assert_refused(copy, message, monkeypatch)


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(*names, shape=(48,)):
    return lambda tensors: tensors.update({name: torch.zeros(shape) for name in names})


DOWN, K = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"
BIAS, NORM = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"
BAD_TENSORS = {
    "missing": (drop(DOWN), f"1 tensors missing, first {DOWN}"),
    "two_missing": (drop(NORM, DOWN), f"2 tensors missing, first {DOWN}"),
    "no_lm_head": (drop("lm_head.weight"), "1 tensors missing, first lm_head.weight"),
    "unknown": (put("model.extra"), "1 unknown tensors, first model.extra"),
    "two_unknown": (put("z", BIAS), f"2 unknown tensors, first {BIAS}"),
    "short": (put(NORM, shape=(47,)), f"{NORM} has shape [47], config.json says [48]"),
    # As many numbers as wanted, the other way round.
    "turned": (put(K, shape=(48, 16)), f"{K} has shape [48, 16], config.json says [16, 48]"),
    "scalar": (put(NORM, shape=()), f"{NORM} has shape [], config.json says [48]"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case, copy, monkeypatch):
    change, message = BAD_TENSORS[case]
    edit_tensors(copy, change)
    where = copy / "model.safetensors" if "shape" in message else copy
    assert_refused(copy, f"{where}: {message}", monkeypatch)


def test_a_config_of_another_size_is_refused(copy, monkeypatch):
    """Four layers where the file holds three; nine tensors each."""
    edit_json(copy / "config.json", lambda config: config.update(num_hidden_layers=4))
    first = "model.layers.3.input_layernorm.weight"
    assert_refused(copy, f"{copy}: 9 tensors missing, first {first}", monkeypatch)


OTHER_DTYPES = [torch.int64, torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", OTHER_DTYPES)
def test_tensors_of_other_dtypes_are_named(kind, copy, monkeypatch):
    edit_tensors(copy, lambda tensors: tensors.update({K: tensors[K].to(kind)}))
    message = f"{copy / 'model.safetensors'}: {K} is {kind}; supported: float16, bfloat16, float32"
    assert_refused(copy, message, monkeypatch)


def test_a_tensor_in_two_shards_is_refused(copy, monkeypatch):
    shutil.copy(copy / "model.safetensors", copy / "other.safetensors")
    weight_map = {"a": "model.safetensors", "b": "other.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(copy, " is also in model.safetensors", monkeypatch)


@pytest.mark.parametrize("case", BAD_BINS)
def test_a_bad_bin_is_named_and_not_executed(case, copy, monkeypatch):
    as_bin(copy)
    file = copy / "pytorch_model.bin"
    write, message = BAD_BINS[case]
    write(file)
    assert_refused(copy, f"{file}: {message}", monkeypatch)
    assert not (copy / "ran").exists()


def test_missing_and_stray_bin_shards_are_named(copy, monkeypatch):
    as_bin(copy, shards=3)
    index, gone = "pytorch_model.bin.index.json", "pytorch_model-00002-of-00003.bin"
    (copy / gone).unlink()
    assert_refused(copy, f"{copy}: {gone} not found; download it again", monkeypatch)
    weight_map = {"a": "pytorch_model-00001-of-00003.bin", "b": "model.safetensors"}
    (copy / index).write_text(json.dumps({"weight_map": weight_map}))
    message = f"{copy / index}: 'model.safetensors' is not the name of a .bin file"
    assert_refused(copy, message, monkeypatch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("store", ["safetensors", "bin"])
def test_weights_that_are_not_finite_are_named(store, value, copy):
    """One number of one tensor, which is a part of a fused one of ours."""
    edit_tensors(copy, lambda tensors: tensors[K].view(-1)[123].fill_(value))
    if store == "bin":
        as_bin(copy)
    with pytest.raises(ValueError, match=re.escape(f": {K} holds NaN or values beyond torch.f")):
        load_model(copy)


def test_weights_too_large_for_the_dtype_are_named(copy):
    """Float16 ends at 65,504; bfloat16 has the range of float32."""
    edit_tensors(copy, lambda tensors: tensors[K].view(-1)[123].fill_(7e4))
    message = f"{copy / 'model.safetensors'}: {K} holds NaN or values beyond torch.float16; "
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(copy, dtype=torch.float16)
    load_model(copy, dtype=torch.bfloat16)


# --- one file alone ----------------------------------------------------------------------------

ALONE = """
import sys
sys.path.insert(0, "")
import torch
from model import kv_cache_shape, load_model

model = load_model(sys.argv[1])
assert not {"speculator", "fastspec", "transformers"} & set(sys.modules)
kv = torch.zeros(kv_cache_shape(model.args, 1, 1))
chain = torch.ones(6, 6, dtype=torch.bool).tril()
tokens = torch.arange(6)[None]
hidden, _ = model(tokens, tokens, kv, torch.zeros(1, dtype=torch.long), chain)
print(model.logits(hidden).argmax(-1).tolist())
"""


def test_the_file_runs_alone(tiny, llama_dir, tmp_path):
    """In a folder that holds nothing else, in an isolated interpreter, with the same result."""
    shutil.copy(module.__file__, tmp_path)
    command = [sys.executable, "-I", "-c", ALONE, str(llama_dir)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = full_logits(tiny, torch.arange(6)[None]).argmax(-1)
    assert json.loads(result.stdout) == expected.tolist()


def test_the_file_imports_only_the_standard_library_torch_and_safetensors():
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms)
    roots = {name.split(".")[0] for name in names | {node.module for node in froms}}
    assert {"torch", "safetensors"} <= roots
    assert roots - sys.stdlib_module_names == {"torch", "safetensors"}
