"""speculator.py against the published formulas, in every form in which a checkpoint is stored."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    BAD_BINS,
    BAD_INDEXES,
    INDEX,
    memory_beside_the_model,
    store_as_bin,
    tiny_speculator,
)
from safetensors.torch import load_file, save_file

import speculator as module
from speculator import LayerNorm, MLPSpeculator, RankEmbedding, SpeculatorArgs, load_speculator

CONFIG = {
    "model_type": "mlp_speculator",
    "emb_dim": 48,
    "inner_dim": 32,
    "n_predict": 3,
    "vocab_size": 97,
}


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def hidden_states(rows=4, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(rows, 48, generator=g) * scale).to(dtype), torch.arange(rows) * 7 + 3


def greedy(logits, position):
    return logits.argmax(-1)


def reference(config, tensors, hidden, token, k, choose=greedy):
    """The published recurrence in float64: the states and logits of k heads, the tokens drafted."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    n, inner_dim = config["n_predict"], config["inner_dim"] or config["emb_dim"]
    state_weight = 0.5 ** (0.5 / n)
    emb_weight = math.sqrt((1 - state_weight**2) * inner_dim / 2)
    state, steps, tokens = hidden.double(), [], []
    if config.get("scale_input"):
        state = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(2)
    for i in range(k):
        state = state @ w[f"proj.{i}.weight"].T
        state = state + emb_weight / state_weight * w[f"emb.{i}.weight"][token]
        state = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        state = state * w[f"ln.{i}.weight"] + w[f"ln.{i}.bias"]
        state = state * (1 + torch.erf(state / math.sqrt(2))) / 2
        logits = state @ w[f"head.{i}.weight"].T
        token = choose(logits, i + 1)
        steps.append((state, logits))
        tokens.append(token)
    return steps, torch.stack(tokens, dim=1)


def steps_of(model, hidden, tokens):
    """States and logits of every head, each after the token it is given: tokens [B, k]."""
    state, steps = model.start(hidden), []
    for i, token in enumerate(tokens.unbind(1)):
        state, logits = model.step(i, state, token)
        steps.append((state, logits))
    return steps


def rescale(directory, factor, pattern):
    """Multiply the tensors whose name contains `pattern`; returns all, named without prefix."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: t * (factor if pattern in name else 1) for name, t in tensors.items()}
    save_file(tensors, file)
    return {name.removeprefix("speculator."): tensor for name, tensor in tensors.items()}


# --- the formulas ------------------------------------------------------------------------------

SHAPES = {
    "untied": {},
    "tied": {"tie_weights": True},
    "scale_input": {"scale_input": True},
    "tied_scale_input": {"tie_weights": True, "scale_input": True},
    "inner_dim_0": {"inner_dim": 0},
    "inner_dim_0_tied": {"inner_dim": 0, "tie_weights": True, "scale_input": True},
    "wide": {"inner_dim": 80},
}
LENGTHS = {1: [1], 3: [4, 3, 2], 5: [4, 3, 2, 2, 2]}


@pytest.mark.parametrize("n_predict", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_and_drafts_equal_the_formulas(shape, n_predict, tmp_path):
    """Also with fewer drafts than heads: the embedding weight is that of the trained n_predict."""
    changes = {"n_predict": n_predict, "top_k_tokens_per_head": LENGTHS[n_predict]}
    config, tensors = tiny_speculator(tmp_path, **SHAPES[shape] | changes)
    model, (hidden, token) = load_speculator(tmp_path), hidden_states()
    for k in range(1, n_predict + 1):
        expected, drafts = reference(config, tensors, hidden, token, k)
        fed = torch.cat((token[:, None], drafts[:, :-1]), dim=1)
        ours = steps_of(model, hidden, fed)
        for (state, logits), (want_state, want) in zip(ours, expected, strict=True):
            # Float32 against float64: at most five steps of three roundings of 6e-8, so about
            # 1e-6. The nearest wrong formula, GELU by tanh instead of erf, is 1e-4 away.
            assert relative_error(state, want_state) < 1e-5
            assert relative_error(logits, want) < 1e-5
            assert logits.dtype == torch.float32
            # Logits are about 1: a gap a hundred times the error leaves argmax no choice.
            best = want.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-4
        got = model.draft(hidden, token, torch.zeros(4, dtype=torch.long), k)
        assert got.dtype == torch.long
        assert torch.equal(got, drafts)


@pytest.mark.parametrize("scale_input", [False, True])
def test_norms_add_1e_6_to_the_mean_square(scale_input, tmp_path):
    """Seen only where the mean square is about as small, in hidden states as in inner ones."""
    config, _ = tiny_speculator(tmp_path, scale_input=scale_input)
    tensors = rescale(tmp_path, 1e-3, "emb")
    if scale_input:  # the first norm makes the state large again
        tensors = rescale(tmp_path, 1e-3, "proj")
    model, (hidden, token) = load_speculator(tmp_path), hidden_states(scale=1e-3)
    ((_, want),), _ = reference(config, tensors, hidden, token, 1)
    ((_, got),) = steps_of(model, hidden, token[:, None])
    assert relative_error(got, want) < 1e-5  # as above


def second_best(logits, position):
    return logits.topk(2).indices[:, 1]


def test_choose_gets_the_logits_and_position_of_each_draft_and_decides_it(tmp_path):
    config, tensors = tiny_speculator(tmp_path)
    model, (hidden, token) = load_speculator(tmp_path), hidden_states()
    calls = []

    def choose(logits, position, ids):
        calls.append((logits, position.tolist()))
        return second_best(logits, position), True

    expected, drafts = reference(config, tensors, hidden, token, 3, second_best)
    assert torch.equal(model.draft(hidden, token, torch.tensor([5, 0, 311, 40]), 3, choose), drafts)
    assert [position for _, position in calls] == [
        [6 + i, 1 + i, 312 + i, 41 + i] for i in range(3)
    ]
    for (logits, _), (_, want) in zip(calls, expected, strict=True):
        assert relative_error(logits, want) < 1e-5  # as above


def test_rows_are_independent(speculator_dir):
    model, (hidden, token) = load_speculator(speculator_dir), hidden_states()
    position = torch.arange(4)
    together = model.draft(hidden, token, position, 3)
    for row in range(4):
        one = slice(row, row + 1)
        alone = model.draft(hidden[one], token[one], position[one], 3)
        assert torch.equal(alone, together[one])


def test_rows_of_a_rank_and_their_gradients_are_those_of_its_table():
    torch.manual_seed(0)
    emb, row = RankEmbedding(50, 12, 4, 16).double(), torch.randint(50, (300, 2))
    for param in emb.parameters():
        torch.nn.init.normal_(param)
    rows, scale = (emb(row), emb.table()[row]), torch.randn(16).double()
    torch.testing.assert_close(*rows)
    torch.testing.assert_close(
        *(torch.autograd.grad((x * scale).square().sum(), emb.parameters()) for x in rows)
    )


# --- 16 bits -----------------------------------------------------------------------------------

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale_input", [False, True])
def test_large_hidden_states_do_not_overflow_16_bits(scale_input, dtype, tmp_path):
    """Squares of 1000 are far beyond float16, whose largest number is 65,504."""
    config, tensors = tiny_speculator(tmp_path, scale_input=scale_input)
    model = load_speculator(tmp_path, dtype=dtype)
    hidden, token = hidden_states(scale=1000.0, dtype=dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected, drafts = reference(config, rounded, hidden, token, 3)
    fed = torch.cat((token[:, None], drafts[:, :-1]), dim=1)
    for (state, logits), (_, want) in zip(steps_of(model, hidden, fed), expected, strict=True):
        assert state.dtype == dtype
        assert logits.dtype == torch.float32
        assert state.isfinite().all()
        # Up to fifteen roundings of half an eps, added up as if all in one direction.
        assert relative_error(logits, want) < 7.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
def test_the_norm_is_computed_in_float32(dtype):
    """Not only free of overflow: 16-bit inputs, exact as they are, give a result to 1e-6."""
    norm, (x, _) = LayerNorm(48), hidden_states(scale=1000.0, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.1, 2, 48))
        norm.bias.copy_(torch.linspace(-1, 1, 48))
        norm = norm.to(dtype)
        got, x = norm(x), x.double()
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want = want * norm.weight.double() + norm.bias.double()
    assert got.dtype == torch.float32
    # Four roundings of 6e-8; one rounding to float16 would be 2.4e-4.
    assert relative_error(got, want) < 1e-6


# --- storage -----------------------------------------------------------------------------------

FIRST = ["emb.0.weight", "head.0.weight", "ln.0.weight", "ln.0.bias", "proj.0.weight"]
TIED_ONCE = [*FIRST, "proj.1.weight"]
TIED_LAST = ["emb.2.weight", "head.2.weight", "ln.2.weight", "ln.2.bias", "proj.0.weight"]
TIED_LAST += ["proj.2.weight"]


def store(directory, tensors, shards=1):
    """Write tensors as one safetensors file, or as shards with their index."""
    (directory / "model.safetensors").unlink()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if shards == 1:
        return save_file(tensors, directory / "model.safetensors")
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_holds(model, tensors):
    """The model's tensors, by published name, are exactly these."""
    state = model.state_dict()
    assert state.keys() <= tensors.keys()
    assert [name for name in state if not torch.equal(state[name], tensors[name])] == []


@pytest.mark.parametrize("save", [store, store_as_bin])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("prefix", ["speculator.", ""])
@pytest.mark.parametrize("form", ["untied", "tied_every_alias", "tied_once", "tied_last_alias"])
def test_every_storage_form_loads_the_same_tensors(form, prefix, shards, save, tmp_path):
    """In a .bin aliases lie over one memory, as in the state_dict of a tied model."""
    _, tensors = tiny_speculator(tmp_path, tie_weights=form != "untied")
    names = {"tied_once": TIED_ONCE, "tied_last_alias": TIED_LAST}.get(form, tensors)
    save(tmp_path, {prefix + name: tensors[name] for name in names}, shards)
    assert bool(list(tmp_path.glob("*.safetensors"))) == (save is store)
    model = load_speculator(tmp_path)
    assert len(model.state_dict()) == (15 if form == "untied" else 6)
    assert_holds(model, tensors)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_safetensors_are_preferred(copy, speculator_dir):
    """One accelerator has both."""
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (copy / name).write_text("neither is read")
    assert_holds(load_speculator(copy), load_speculator(speculator_dir).state_dict())


def test_parameters_and_views_in_a_bin_load_as_their_values(tmp_path):
    _, tensors = tiny_speculator(tmp_path)
    turned = {n: torch.nn.Parameter(t.t().contiguous().t()) for n, t in tensors.items()}
    store_as_bin(tmp_path, turned)
    model = load_speculator(tmp_path)
    assert_holds(model, tensors)
    assert not any(p.requires_grad or p.grad_fn for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_needs_room_for_one_tensor_beside_the_model(tmp_path):
    """... and not for the file: 50 MB, as is the model, of which no tensor has over 9 MB."""
    _, tensors = tiny_speculator(tmp_path / "safetensors", vocab_size=32768, inner_dim=64)
    shutil.copytree(tmp_path / "safetensors", tmp_path / "bin")
    store_as_bin(tmp_path / "bin", tensors)
    directories = [tmp_path / "safetensors", tmp_path / "bin"]
    for extra, held in memory_beside_the_model("speculator", "load_speculator", directories):
        assert held > 50e6
        assert extra < 9e6


@pytest.mark.parametrize("tie_weights", [False, True])
def test_one_head_is_stored_without_a_second_projection(tie_weights, tmp_path):
    changes = {"n_predict": 1, "top_k_tokens_per_head": [1], "tie_weights": tie_weights}
    _, tensors = tiny_speculator(tmp_path, **changes)
    assert sorted(tensors) == sorted(FIRST)
    model = load_speculator(tmp_path)
    assert sorted(model.state_dict()) == sorted(FIRST)
    assert_holds(model, tensors)


@pytest.mark.parametrize("load_as", [torch.float32, *HALF])
@pytest.mark.parametrize("stored_as", [torch.float32, *HALF])
def test_dtypes_of_file_and_model_are_independent(stored_as, load_as, tmp_path):
    _, tensors = tiny_speculator(tmp_path)
    stored = {name: tensor.to(stored_as) for name, tensor in tensors.items()}
    store(tmp_path, stored)
    model = load_speculator(tmp_path, dtype=load_as)
    assert {p.dtype for p in model.parameters()} == {load_as}
    assert_holds(model, {name: tensor.to(load_as) for name, tensor in stored.items()})


@pytest.mark.parametrize("shards", [1, 2])
def test_progress_wraps_the_names_of_all_tensors(shards, tmp_path):
    _, tensors = tiny_speculator(tmp_path)
    store(tmp_path, tensors, shards)
    seen = []
    load_speculator(tmp_path, progress=lambda names: (seen.append(n) or n for n in names))
    assert sorted(seen) == sorted(tensors)


# --- the published speculators -----------------------------------------------------------------

# config.json of IBM's nine accelerators (keys that are not known for certain are left out), and
# the size of their weight files in GB, 16-bit, to as many digits as are known.
PUBLISHED = {
    "llama-13b-accelerator": (
        {"emb_dim": 5120, "inner_dim": 4096, "n_predict": 3, "vocab_size": 32000}
        | {"top_k_tokens_per_head": [5, 3, 2], "n_candidates": 5}
        | {"base_model_name_or_path": "meta-llama/Llama-2-13b-chat-hf"},
        "1.68197",
    ),
    "llama3-8b-accelerator": (
        {"emb_dim": 4096, "inner_dim": 3072, "n_predict": 4, "vocab_size": 128256}
        | {"top_k_tokens_per_head": [4, 3, 2, 2], "n_candidates": 5}
        | {"base_model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct"},
        "6.385876992",
    ),
    "codellama-34b-accelerator": (
        {"emb_dim": 8192, "inner_dim": 8192, "n_predict": 5, "vocab_size": 32000}
        | {"tie_weights": True, "scale_input": True},
        "1.32",
    ),
    "llama2-70b-accelerator": (
        {"emb_dim": 8192, "inner_dim": 8192, "n_predict": 4, "vocab_size": 32000}
        | {"top_k_tokens_per_head": [4, 3, 2, 2], "n_candidates": 4}
        | {"tie_weights": True, "scale_input": True},
        "1.32",
    ),
    "llama3-70b-accelerator": (
        {"emb_dim": 8192, "inner_dim": 8192, "n_predict": 4, "vocab_size": 128256}
        | {"top_k_tokens_per_head": [4, 3, 2, 2], "n_candidates": 4}
        | {"tie_weights": True, "scale_input": True}
        | {"base_model_name_or_path": "meta-llama/Meta-Llama-3-70B-Instruct"},
        "4.47",
    ),
    "granite-3b-code-instruct-accelerator": (
        {"emb_dim": 2560, "inner_dim": 4096, "n_predict": 5, "vocab_size": 49152}
        | {"top_k_tokens_per_head": [4, 3, 2, 2, 2], "n_candidates": 5, "tie_weights": True},
        "0.86",
    ),
    "granite-8b-code-instruct-accelerator": (
        {"emb_dim": 4096, "inner_dim": 4096, "n_predict": 5, "vocab_size": 49152},
        "4.19",
    ),
    "granite-7b-instruct-accelerator": (
        {"emb_dim": 4096, "inner_dim": 4096, "n_predict": 5, "vocab_size": 32008}
        | {"top_k_tokens_per_head": [4, 3, 2, 2, 2], "n_candidates": 5}
        | {"base_model_name_or_path": "ibm-granite/granite-7b-instruct"},
        "2.79",
    ),
    "granite-20b-code-instruct-accelerator": (
        {"emb_dim": 6144, "inner_dim": 4096, "n_predict": 4, "vocab_size": 49152}
        | {"tie_weights": False, "scale_input": False},
        "3.37",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_and_sizes(name):
    config, gigabytes = PUBLISHED[name]
    args = SpeculatorArgs.from_config(config | {"model_type": "mlp_speculator"})
    assert (args.tie_weights, args.scale_input) == (
        config.get("tie_weights", False),
        config.get("scale_input", False),
    )
    assert args.base_model == config.get("base_model_name_or_path")
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in MLPSpeculator(args).parameters())
    assert f"{size / 1e9:.{len(gigabytes.partition('.')[2])}f}" == gigabytes


# --- lenient configs ---------------------------------------------------------------------------


def test_a_config_with_the_required_fields_alone():
    args = SpeculatorArgs.from_config(CONFIG)
    assert (args.emb_dim, args.inner_dim, args.n_predict, args.vocab_size) == (48, 32, 3, 97)
    assert (args.tie_weights, args.scale_input) == (False, False)
    assert args.top_k_tokens_per_head == (1, 1, 1)
    assert (args.n_candidates, args.base_model) == (None, None)


def test_a_config_with_every_field():
    choices = {"tie_weights": True, "scale_input": True, "inner_dim": 0, "n_candidates": 5}
    more = {"top_k_tokens_per_head": [4, 3, 2], "base_model_name_or_path": "someone/base"}
    args = SpeculatorArgs.from_config(CONFIG | choices | more)
    assert (args.tie_weights, args.scale_input, args.inner_dim) == (True, True, 48)
    assert (args.top_k_tokens_per_head, args.n_candidates) == ((4, 3, 2), 5)
    assert args.base_model == "someone/base"


LENIENT = {
    "architectures_a_string": {"architectures": "MLPSpeculatorPreTrainedModel"},
    "architectures_null": {"architectures": None},
    "unknown_keys": {"torch_dtype": "float16", "transformers_version": "4.38.2", "new": {"a": [1]}},
    "arctic": {"architectures": "ArcticMLPSpeculatorPreTrainedModel", "base_model_archs": ["a"]},
    "arctic_spelling": {"top_k_tokens_per_head": None, "top_k_tokesns_per_head": [1, 1, 1]},
    "no_top_k": {"top_k_tokens_per_head": None},
    "empty_top_k": {"top_k_tokens_per_head": []},
}


@pytest.mark.parametrize("case", LENIENT)
def test_lenient_configs_load_and_draft_alike(case, speculator_dir, tmp_path):
    copy = shutil.copytree(speculator_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | LENIENT[case]
    config = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    models, (hidden, token) = map(load_speculator, (copy, speculator_dir)), hidden_states()
    got, usual = (model.draft(hidden, token, token, 3) for model in models)
    assert torch.equal(got, usual)


# --- errors ------------------------------------------------------------------------------------


def never(names):
    pytest.fail("a weight was about to be copied")


def assert_refused(directory, message, monkeypatch):
    """ValueError with `message`, before memory is taken and before any weight is copied."""
    monkeypatch.setattr(MLPSpeculator, "to_empty", lambda *args, **kwargs: never(args))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_speculator(directory, progress=never)


@pytest.fixture
def copy(speculator_dir, tmp_path):
    """A checkpoint that the test may damage."""
    return shutil.copytree(speculator_dir, tmp_path / "copy")


@pytest.fixture
def tied(tmp_path):
    """A tied checkpoint with each tensor stored once, under its first name and the prefix."""
    _, tensors = tiny_speculator(tmp_path / "tied", tie_weights=True)
    store(tmp_path / "tied", {f"speculator.{name}": tensors[name] for name in TIED_ONCE})
    return tmp_path / "tied"


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    store(directory, tensors)


@pytest.mark.parametrize("kind", ["llama", "mlp", None])
def test_other_model_types_are_named(kind):
    message = f"config.json: model_type {kind!r} is not a speculator; expected 'mlp_speculator'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        SpeculatorArgs.from_config(CONFIG | {"model_type": kind})


def test_arctics_lstm_speculators_are_named():
    config = CONFIG | {"method": "sum_lstm", "emb_dim": "4096", "inner_dim": "4096"}
    with pytest.raises(ValueError, match=r"method 'sum_lstm' \(of Arctic's LSTM speculators\) is"):
        SpeculatorArgs.from_config(config)


@pytest.mark.parametrize("value", [0, -1, 5.0, "5", True, [5], 1025, 10**400], ids=str)
def test_n_candidates_must_be_an_integer_of_a_sane_size(value):
    message = f"config.json: n_candidates must be an integer of 1 to 1024, found {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SpeculatorArgs.from_config(CONFIG | {"n_candidates": value})


@pytest.mark.parametrize("value", [5, ["a/b"], True], ids=str)
def test_the_base_model_must_be_a_name(value):
    message = f"config.json: base_model_name_or_path must be a name, found {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SpeculatorArgs.from_config(CONFIG | {"base_model_name_or_path": value})


def test_the_largest_numbers_that_pass_take_neither_memory_nor_minutes(copy, monkeypatch):
    largest = {"emb_dim": 2**24, "inner_dim": 2**24, "vocab_size": 2**24, "n_predict": 1024}
    config = json.loads((copy / "config.json").read_text()) | largest
    del config["top_k_tokens_per_head"]
    (copy / "config.json").write_text(json.dumps(config))
    assert_refused(copy, f"{copy}: 5105 tensors missing, first emb.10.weight", monkeypatch)


SIZES = ["emb_dim", "inner_dim", "n_predict", "vocab_size"]
NOT_SIZES = [0, -1, 48.0, "48", True, [48], 10**9, 2**40, 10**400, math.inf, math.nan]


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, v) for f in SIZES for v in NOT_SIZES if (f, v) != ("inner_dim", 0)],
    ids=lambda value: repr(value)[:12],
)
def test_sizes_must_be_integers_of_a_sane_size(field, value):
    least, most = int(field != "inner_dim"), 1024 if field == "n_predict" else 2**24
    message = f"config.json: {field} must be an integer of {least} to {most}, found {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SpeculatorArgs.from_config(CONFIG | {field: value})


@pytest.mark.parametrize("field", SIZES)
def test_missing_fields_are_named(field):
    without = {key: value for key, value in CONFIG.items() if key != field}
    for config in (without, CONFIG | {field: None}):
        with pytest.raises(ValueError, match=f"^config.json: {field} is missing$"):
            SpeculatorArgs.from_config(config)


@pytest.mark.parametrize(
    "top_k",
    [[4, 3], [4, 3, 2, 2], [4, 0, 2], [4, -3, 2], [4, 3.0, 2], 3, [True] * 3, "432", [4, 3, 1025]],
    ids=str,
)
def test_top_k_must_be_one_integer_per_head(top_k):
    message = "config.json: top_k_tokens_per_head must be 3 (n_predict) integers of 1 to 1024, "
    message += "found "
    with pytest.raises(ValueError, match=f"^{re.escape(message + repr(top_k))}$"):
        SpeculatorArgs.from_config(CONFIG | {"top_k_tokens_per_head": top_k})


RANKED = {"tie_weights": True, "draft_vocab_size": 40, "emb_rank": 5}


@pytest.fixture
def ranked(tmp_path):
    """A checkpoint with a draft vocabulary and low-rank embeddings of the other tokens."""
    _, tensors = tiny_speculator(tmp_path / "ranked", **RANKED)
    small = {name: tensors[name] for name in TIED_ONCE}
    small["emb.0.weight"], small["head.0.weight"] = small["emb.0.weight"][:41], torch.randn(40, 32)
    small |= {"emb.0.down": torch.randn(57, 5), "emb.0.up": torch.randn(5, 32)}
    store(tmp_path / "ranked", small | {"draft_ids": torch.arange(40).int()})
    return tmp_path / "ranked"


def test_a_rank_loads_under_any_alias_and_is_counted_as_rows(ranked):
    """In a module of numbers that are not there, as memory is estimated, too."""
    first = load_speculator(ranked)
    with torch.device("meta"):
        assert MLPSpeculator(first.args).filled().emb[0].weight.shape == (97, 32)
    edit_tensors(ranked, lambda t: t.update({"emb.2.up": t.pop("emb.0.up")}))
    assert_holds(load_speculator(ranked), first.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("emb.0.down"), "1 tensors missing, first emb.0.down"),
        (lambda t: t.update({"emb.0.up": torch.zeros(4, 32)}), "emb.0.up has shape [4, 32], conf"),
        (lambda t: t.update({"emb.0.weight": torch.zeros(97, 32)}), "emb.0.weight has shape [97, "),
        (lambda t: t.update({"emb.0.down": torch.zeros(57, 5).char()}), "emb.0.down is torch.int8"),
    ],
)
def test_tensors_of_a_rank_that_do_not_fit_are_named(ranked, change, message, monkeypatch):
    edit_tensors(ranked, change)
    assert_refused(ranked, message, monkeypatch)


@pytest.mark.parametrize("value", [0, -1, 49, 5.0, "5", True], ids=str)
def test_a_rank_must_be_an_integer_of_a_sane_size(value):
    message = f"config.json: emb_rank must be an integer of 1 to 48, found {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SpeculatorArgs.from_config(CONFIG | RANKED | {"emb_rank": value})


@pytest.mark.parametrize("drafted", [None, 97])
def test_a_rank_needs_tokens_that_are_not_drafted(drafted):
    message = "^config.json: emb_rank needs a draft_vocab_size below vocab_size$"
    with pytest.raises(ValueError, match=message):
        SpeculatorArgs.from_config(CONFIG | RANKED | {"draft_vocab_size": drafted})


CONFIG_FILES = {
    "absent": (None, "config.json: no such file; is this a speculator directory?"),
    "not_json": (b'{"model_type": ', "config.json: not valid JSON ("),
    "not_utf8": (b'{"model_type": "\xff"}', "config.json: not valid JSON ("),
    "not_an_object": (b"3", "config.json: expected a JSON object, found int"),
    "a_llama": (b'{"model_type": "llama"}', "config.json: model_type 'llama' is not a speculator"),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_bad_config_file_is_named(case, copy, monkeypatch):
    content, message = CONFIG_FILES[case]
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_bytes(content)
    assert_refused(copy, message, monkeypatch)


@pytest.mark.parametrize("keep", [-1, -9000, 500, 4, 0])
def test_a_truncated_file_is_named(keep, copy, monkeypatch):
    """Cut in the last tensor, further up, inside the header, inside its length, to nothing."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(copy, f"{file}: cut off or damaged (", monkeypatch)


def test_a_missing_single_file_is_named(copy, monkeypatch):
    (copy / "model.safetensors").unlink()
    message = f"{copy}: neither model.safetensors nor pytorch_model.bin found; download it again"
    assert_refused(copy, message, monkeypatch)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_bad_shard_is_named(damage, copy, monkeypatch):
    store(copy, load_file(copy / "model.safetensors"), shards=3)
    shard = copy / "model-00002-of-00003.safetensors"
    message = f"{copy}: {shard.name} not found; download it again"
    if damage == "missing":
        shard.unlink()
    else:
        message = f"{shard}: cut off or damaged ("
        shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(copy, message, monkeypatch)


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_named(case, copy, monkeypatch):
    text, message = BAD_INDEXES[case]
    (copy / INDEX).write_text(text)
    assert_refused(copy, message, monkeypatch)


def drop(*names):
    return lambda tensors: [tensors.pop(f"speculator.{name}") for name in names]


def put(*names, shape=(32,)):
    return lambda tensors: tensors.update({f"speculator.{n}": torch.zeros(shape) for n in names})


PROJ, TURNED = "proj.0.weight has shape [32, 47]", "proj.0.weight has shape [48, 32]"
BAD_TENSORS = {
    "missing": ("copy", drop("proj.2.weight"), "1 tensors missing, first proj.2.weight"),
    "two_missing": ("copy", drop("ln.1.bias", "emb.2.weight"), "2 tensors missing, first emb.2"),
    "missing_tied": ("tied", drop("ln.0.bias"), "1 tensors missing, first ln.0.bias"),
    "missing_shared_proj": ("tied", drop("proj.1.weight"), "1 tensors missing, first proj.1"),
    "first_proj_is_not_shared": ("tied", drop("proj.0.weight"), "1 tensors missing, first proj.0"),
    "unknown": ("copy", put("extra"), "1 unknown tensors, first extra"),
    "two_unknown": ("copy", put("z", "head.0.bias"), "2 unknown tensors, first head.0.bias"),
    "too_many_heads": ("copy", put("ln.3.bias"), "1 unknown tensors, first ln.3.bias"),
    "too_many_tied_heads": ("tied", put("ln.3.bias"), "1 unknown tensors, first ln.3.bias"),
    "narrow": ("copy", put("proj.0.weight", shape=(32, 47)), PROJ + ", config.json says [32, 48]"),
    # As many numbers as wanted, the other way round.
    "turned": ("copy", put("proj.0.weight", shape=(48, 32)), TURNED),
    "alias": ("tied", put("ln.2.bias", shape=(31,)), "ln.2.bias has shape [31], config.json says"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case, request, monkeypatch):
    fixture, change, message = BAD_TENSORS[case]
    directory = request.getfixturevalue(fixture)
    edit_tensors(directory, change)
    where = f"{directory}: "
    if "shape" in message:  # of one file, whose own name for the tensor is given
        where = f"{directory / 'model.safetensors'}: speculator."
    assert_refused(directory, where + message, monkeypatch)


def test_a_tied_file_whose_config_does_not_say_so_is_refused(tied, monkeypatch):
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_weights": False}))
    assert_refused(tied, f"{tied}: 9 tensors missing, first emb.1.weight", monkeypatch)


OTHER_DTYPES = [torch.int64, torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", OTHER_DTYPES)
def test_tensors_of_other_dtypes_are_named(kind, copy, monkeypatch):
    name = "speculator.emb.1.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    message = f"{copy / 'model.safetensors'}: {name} is {kind}; supported: float16, "
    assert_refused(copy, message, monkeypatch)


def test_a_tensor_with_and_without_the_prefix_is_refused(copy, monkeypatch):
    edit_tensors(copy, lambda tensors: tensors.update({"ln.0.bias": torch.zeros(32)}))
    assert_refused(copy, "ln.0.bias is also in model.safetensors", monkeypatch)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    """Loading one of them would draft wrongly without a word."""
    _, tensors = tiny_speculator(tmp_path, tie_weights=True)
    store(tmp_path, tensors | {"head.2.weight": tensors["head.2.weight"] + 1})
    with pytest.raises(ValueError, match=r"head\.2\.weight differs from the tensor it is tied to"):
        load_speculator(tmp_path)


@pytest.mark.parametrize("field", ["tie_weights", "scale_input"])
def test_flags_must_be_true_or_false(field):
    with pytest.raises(ValueError, match=f"{field} must be true or false, found 'false'"):
        SpeculatorArgs.from_config(CONFIG | {field: "false"})


@pytest.mark.parametrize("case", BAD_BINS)
def test_a_bad_bin_is_named_and_not_executed(case, copy, monkeypatch):
    store_as_bin(copy, load_file(copy / "model.safetensors"))
    file = copy / "pytorch_model.bin"
    write, message = BAD_BINS[case]
    write(file)
    assert_refused(copy, f"{file}: {message}", monkeypatch)
    assert not (copy / "ran").exists()


def test_a_missing_bin_shard_is_named(copy, monkeypatch):
    store_as_bin(copy, load_file(copy / "model.safetensors"), shards=3)
    (copy / "pytorch_model-00002-of-00003.bin").unlink()
    message = f"{copy}: pytorch_model-00002-of-00003.bin not found; download it again"
    assert_refused(copy, message, monkeypatch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("form", [{}, {"tie_weights": True}], ids=["untied", "tied"])
def test_weights_that_are_not_finite_are_named(form, bin_file, value, tmp_path):
    """Drafts of such a head would never be accepted, without a word."""
    _, tensors = tiny_speculator(tmp_path, **form)
    tensors["proj.1.weight"].view(-1)[123] = value
    if form:
        tensors = {name: tensors[name] for name in TIED_ONCE}
    (store_as_bin if bin_file else store)(tmp_path, tensors)
    with pytest.raises(ValueError, match=r": proj\.1\.weight holds NaN or values beyond torch.fl"):
        load_speculator(tmp_path)


def test_weights_too_large_for_the_dtype_are_named(tmp_path):
    """Float16 ends at 65,504; bfloat16 has the range of float32."""
    _, tensors = tiny_speculator(tmp_path)
    tensors["head.2.weight"].view(-1)[5] = 7e4
    store(tmp_path, tensors)
    message = f"{tmp_path / 'model.safetensors'}: head.2.weight holds NaN or values beyond "
    with pytest.raises(ValueError, match=re.escape(message + "torch.float16; ")):
        load_speculator(tmp_path, dtype=torch.float16)
    load_speculator(tmp_path, dtype=torch.bfloat16)


# --- one file alone ----------------------------------------------------------------------------

ALONE = """
import sys
sys.path.insert(0, "")
import torch
from speculator import load_speculator

speculator = load_speculator(sys.argv[1])
assert not {"model", "fastspec", "transformers"} & set(sys.modules)
hidden = torch.arange(96).view(2, 48) / 50 - 1
token = torch.tensor([3, 4])
print(speculator.draft(hidden, token, token, 3).tolist())
"""


def test_the_file_runs_alone(speculator_dir, tmp_path):
    """In a folder that holds nothing else, in an isolated interpreter, with the same result."""
    shutil.copy(module.__file__, tmp_path)
    command = [sys.executable, "-I", "-c", ALONE, str(speculator_dir)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    hidden, token = torch.arange(96).view(2, 48) / 50 - 1, torch.tensor([3, 4])
    expected = load_speculator(speculator_dir).draft(hidden, token, token, 3)
    assert json.loads(result.stdout) == expected.tolist()


def test_the_file_imports_only_the_standard_library_torch_and_safetensors():
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms)
    roots = {name.split(".")[0] for name in names | {node.module for node in froms}}
    assert roots - sys.stdlib_module_names == {"torch", "safetensors"}
