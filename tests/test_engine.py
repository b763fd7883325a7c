"""The decode step: speculative ids equal plain ids equal transformers' greedy ids, in float32."""

import math
import os
import shutil
import weakref

import pytest
import torch
import torch.nn as nn
from conftest import (
    Scripted,
    load,
    run_requests,
    script_for,
    store_as_bin,
    tiny_gpt_bigcode,
    tiny_llama,
    tiny_speculator,
)
from safetensors.torch import load_file

import fastspec
from fastspec import (
    LLM,
    BriefNorm,
    ByteLinear,
    Engine,
    HalfLinear,
    PackedLinear,
    Request,
    SamplingParams,
    check_memory,
    decode_loop,
    pack_linears,
    packs_linears,
)
from model import ModelArgs, load_model, read_json
from speculator import LayerNorm, MLPSpeculator, SpeculatorArgs, load_speculator

VOCAB = 97
PROMPTS = [[5, 6, 7], [1] * 40, [9, 8], [3, 4, 5, 6, 11, 12, 13], [2]]
NEW = 100


@pytest.fixture(scope="module")
def greedy(llama_dir):
    """What transformers generates greedily after each prompt."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(llama_dir)
    new = {"max_new_tokens": NEW, "do_sample": False}
    ids = [reference.generate(torch.tensor([p]), **new)[0, len(p) :].tolist() for p in PROMPTS]
    assert all(len(set(row)) > 40 for row in ids)  # no loops: the comparison means something
    return ids


def engine_for(model, speculator=None, k=3, **options):
    engine = Engine(model, speculator, num_draft_tokens=k, **({"max_seq_len": 256} | options))
    engine.ahead = 1  # as on a GPU
    return engine


def test_many_engines_may_compile(llama_dir, monkeypatch):
    """The same function, each of them four times at most: torch would stop at the ninth."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    with torch._dynamo.config.patch(recompile_limit=8):
        Engine(load_model(llama_dir), compiled=True)
        assert torch._dynamo.config.recompile_limit == 256


def run(engine, prompts, params=None, stop_ids=(), seed=0):
    """Token ids of each prompt, and each one's count of decode steps and accepted drafts."""
    params = params or SamplingParams(temperature=0, max_tokens=NEW)
    return run_requests(engine, [Request(p, params, seed, list(stop_ids)) for p in prompts])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_greedy_equals_transformers(model, speculator, greedy, k, batch_size):
    """Token for token, ragged prompts, with more requests than rows and without."""
    tokens, _, _ = run(engine_for(model, speculator, k, batch_size=batch_size), PROMPTS)
    assert tokens == greedy


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_right_drafts_are_all_accepted_in_the_fewest_steps(model, greedy, k):
    """Each step emits k + 1."""
    engine = engine_for(model, Scripted(script_for(PROMPTS, greedy), VOCAB), k, batch_size=5)
    tokens, steps, _ = run(engine, PROMPTS)
    assert tokens == greedy
    assert steps == [-(-NEW // (k + 1))] * 5


def test_wrong_drafts_are_never_accepted(model, greedy):
    engine = engine_for(model, Scripted(script_for(PROMPTS, greedy), VOCAB, 1), batch_size=5)
    tokens, steps, accepted = run(engine, PROMPTS)
    assert tokens == greedy
    assert steps == [NEW] * 5 and accepted == [0] * 5


def test_a_draft_after_a_wrong_one_is_never_accepted(model, greedy):
    """Every 4th position is drafted wrong: with k = 3 each step runs up to that position."""
    engine = engine_for(model, Scripted(script_for(PROMPTS, greedy), VOCAB, 4), batch_size=5)
    tokens, steps, _ = run(engine, PROMPTS)
    assert tokens == greedy
    for prompt, count in zip(PROMPTS, steps, strict=True):
        position, expected = len(prompt) - 1, 0  # of the last token
        while position < len(prompt) + NEW - 1:
            position += min((-position - 1) % 4, 3) + 1
            expected += 1
        assert count == expected


def test_random_speculator_is_sometimes_accepted(model, speculator):
    """Noise shared between draft and target makes even a random speculator agree at T = 2."""
    params = SamplingParams(temperature=2.0, max_tokens=150)
    _, steps, accepted = run(engine_for(model, speculator, batch_size=5), PROMPTS, params)
    assert 0 < sum(accepted) < 3 * sum(steps)


SAMPLED = [
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=40),
    SamplingParams(temperature=1.3, top_k=8, max_tokens=40),
    SamplingParams(temperature=1.0, min_p=0.05, top_p=0.95, top_k=30, max_tokens=40),
]


@pytest.mark.parametrize("params", SAMPLED, ids=["top_p", "top_k", "all"])
def test_same_seed_same_text_whatever_the_speculation_and_batch(model, speculator, params):
    expected, _, _ = run(engine_for(model, None), PROMPTS, params, seed=11)
    for k, batch_size in [(1, 2), (2, 5), (3, 1), (3, 3)]:
        engine = engine_for(model, speculator, k, batch_size=batch_size)
        tokens, _, _ = run(engine, PROMPTS, params, seed=11)
        assert tokens == expected, (k, batch_size)
    other, _, _ = run(engine_for(model, None, batch_size=5), PROMPTS, params, seed=12)
    assert all(a != b for a, b in zip(expected, other, strict=True))


def test_right_drafts_are_accepted_when_sampling(model):
    """The script of a sampled run is accepted whole: target choices depend on position alone."""
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=60)
    expected, _, _ = run(engine_for(model), PROMPTS, params, seed=5)
    scripted = Scripted(script_for(PROMPTS, expected), VOCAB)
    tokens, steps, _ = run(engine_for(model, scripted, batch_size=5), PROMPTS, params, seed=5)
    assert tokens == expected and steps == [15] * 5


def test_greedy_and_sampled_rows_share_a_batch(model, speculator, greedy):
    engine = engine_for(model, speculator, batch_size=2)
    params = [SamplingParams(temperature=0, max_tokens=60), SAMPLED[0]]
    requests = [Request(PROMPTS[0], p, 11, []) for p in params]
    tokens = [[], []]
    for event in decode_loop(engine, requests):
        tokens[event.request] += event.tokens
    assert tokens[0] == greedy[0][:60]
    assert tokens[1] == run(engine_for(model), PROMPTS[:1], SAMPLED[0], seed=11)[0][0]


@pytest.mark.parametrize("wrong_every", [0, 1, 3])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 50])
def test_end_of_sequence_anywhere_in_a_step(model, greedy, at, wrong_every):
    """The answer ends with the end id itself, wherever in a draft it falls."""
    answer = greedy[0]
    at = next(i for i in range(at, NEW) if answer[i] not in answer[:i])
    script = Scripted(script_for(PROMPTS[:1], greedy[:1]), VOCAB, wrong_every)
    tokens, _, _ = run(engine_for(model, script), PROMPTS[:1], stop_ids=[96, answer[at]])
    expected = next(i for i, t in enumerate(answer) if t in (96, answer[at]))
    assert tokens[0] == answer[: expected + 1]


@pytest.mark.parametrize("wrong_every", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_cache_filled_to_the_last_slot(model, greedy, wrong_every, batch_size):
    """max_seq_len bounds prompt and answer together, and the last slots are used rightly."""
    script = script_for(PROMPTS, greedy, max_seq_len=64)
    for n in range(0, 5, batch_size):
        rows = slice(n, n + batch_size)
        scripted = Scripted(script[rows], VOCAB, wrong_every)
        engine = engine_for(model, scripted, batch_size=batch_size, max_seq_len=64)
        tokens, _, _ = run(engine, PROMPTS[rows])
        for prompt, answer, expected in zip(PROMPTS[rows], tokens, greedy[rows], strict=True):
            assert len(prompt) + len(answer) == 64
            assert answer == expected[: len(answer)]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_token_limit_cuts_inside_a_step(model, greedy, max_tokens):
    engine = engine_for(model, Scripted(script_for(PROMPTS, greedy), VOCAB), batch_size=5)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    assert run(engine, PROMPTS, params)[0] == [answer[:max_tokens] for answer in greedy]


def test_finished_row_stays_as_it_was(model, greedy):
    """A done row is frozen while its neighbour goes on."""
    engine = engine_for(model, Scripted(script_for(PROMPTS, greedy), VOCAB), batch_size=2)
    requests = [
        Request(PROMPTS[0], SamplingParams(temperature=0, max_tokens=10), 0, []),
        Request(PROMPTS[1], SamplingParams(temperature=0, max_tokens=100), 0, []),
    ]
    for event in decode_loop(engine, requests):
        if event.request == 0 and event.done:
            frozen = engine.length[0].item(), engine.hidden[0].clone()
    assert frozen[0] == len(PROMPTS[0]) + 10 == engine.length[0]
    assert torch.equal(frozen[1], engine.hidden[0])
    assert engine.tokens[0, :13].tolist() == PROMPTS[0] + greedy[0][:10]


def test_rows_are_refilled_with_requests_of_all_lengths(model, speculator, greedy):
    """Rows change hands many times, and no request sees another's tokens."""
    prompts = [PROMPTS[i % 5] for i in range(17)]
    lengths = [1 + (i * 37) % 90 for i in range(17)]
    requests = [
        Request(p, SamplingParams(temperature=0, max_tokens=n), 0, [])
        for p, n in zip(prompts, lengths, strict=True)
    ]
    tokens = [[] for _ in prompts]
    for event in decode_loop(engine_for(model, speculator, batch_size=3), requests):
        tokens[event.request] += event.tokens
    assert tokens == [greedy[i % 5][:n] for i, n in enumerate(lengths)]


def test_cancelled_request_leaves_its_row_clean(model, speculator, greedy):
    """The step that is already queued when a request is cancelled reaches nobody."""
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=50), 0, []) for p in PROMPTS]
    tokens = [[] for _ in PROMPTS]
    for event in decode_loop(engine_for(model, speculator, batch_size=2), requests):
        tokens[event.request] += event.tokens
        event.cancel = event.request in (0, 2) and len(tokens[event.request]) >= 7
    for i, answer in enumerate(tokens):
        assert answer == greedy[i][: len(answer)]
        assert len(answer) in (range(7, 11) if i in (0, 2) else [50])


def test_abandoned_run_leaves_the_engine_usable(model, speculator, greedy):
    engine = engine_for(model, speculator, batch_size=2)
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=50), 0, []) for p in PROMPTS]
    events = decode_loop(engine, requests)
    for _ in range(5):
        next(events)
    events.close()
    assert engine.done.all()
    assert run(engine, PROMPTS)[0] == greedy


def test_prompt_longer_than_the_largest_prefill_size(model, speculator, greedy, monkeypatch):
    monkeypatch.setattr(fastspec, "PREFILL_SIZES", (4, 8))
    assert run(engine_for(model, speculator, batch_size=2), PROMPTS)[0] == greedy


def verified_widths(engine):
    """Candidates per row of the verifications to come, but for those of ended rows."""
    verify, widths = engine.verify, set()

    def noting(tokens, *rest):
        if not engine.done.all():
            widths.add(tokens.shape[1])
        return verify(tokens, *rest)

    engine.verify = noting
    return widths


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_cpu_verifies_likely_drafts_only(model, speculator, monkeypatch, temperature):
    """As many drafts as the threshold leaves, from one to all, and the same text."""
    params = SamplingParams(temperature=temperature, max_tokens=40)
    expected, _, _ = run(engine_for(model), PROMPTS[:2], params, seed=4)
    found = {}
    for least in (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 1.0):
        monkeypatch.setattr(fastspec, "LIKELY", least)
        engine = engine_for(model, speculator, batch_size=2)
        found[least] = verified_widths(engine)
        assert run(engine, PROMPTS[:2], params, seed=4)[0] == expected
    most = engine.k + 1
    assert found[0.0] == {most} and found[1.0] == {2}
    engine.all_drafts = True  # as bench.py times them, in rows that have ended
    assert engine.draft(torch.tensor([1, 2]), torch.tensor([0, 0]), False).shape == (2, most)
    assert 3 in set().union(*found.values())


@pytest.mark.parametrize("max_seq_len", [60, 256])  # 60: its end has no room for a tree
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_cpu_verifies_likely_tokens_beside_a_chain(
    model, speculator, monkeypatch, temperature, max_seq_len
):
    """Up to three at each depth, some of which are accepted, and the same text."""
    params = SamplingParams(temperature=temperature, max_tokens=None)
    options = {"max_seq_len": max_seq_len}
    expected, steps, _ = run(engine_for(model, **options), PROMPTS[:2], params, seed=4)
    chain = run(engine_for(model, speculator, **options), PROMPTS[:2], params, seed=4)[1]
    for least in (0.0, 1e-3, 1e-2):
        monkeypatch.setattr(fastspec, "SIBLING", least)
        engine = engine_for(model, speculator, **options)
        widths = verified_widths(engine)
        found, steps, _ = run(engine, PROMPTS[:2], params, seed=4)
        assert found == expected
        assert max(widths) > engine.k + 1 and max(widths) <= 1 + 4 * engine.k
        if least == 0:
            assert sum(steps) < sum(chain)


def test_tokens_beside_a_chain_are_of_the_draft_vocabulary(model, monkeypatch):
    monkeypatch.setattr(fastspec, "SIBLING", 0.0)
    torch.manual_seed(0)
    few = MLPSpeculator(SpeculatorArgs(48, 32, 3, 128, tie_weights=True, draft_vocab_size=9))
    few.set_draft_ids(torch.arange(40, 58, 2))
    engine = engine_for(model, few.requires_grad_(False))
    tokens, parent = engine.draft_likely(torch.tensor([3]), torch.tensor([0]), False)
    assert parent.tolist() == [[0, 0, 1, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert tokens[0, 0] == 3 and torch.isin(tokens[0, 1:], few.draft_ids).all()
    assert all(len({*tokens[0, parent[0] == i].tolist()} - {3}) == 4 for i in range(3))


def test_an_accepted_token_beside_the_chain_moves_to_its_end(model, speculator):
    """Its key and value to the slot of the draft in whose place it is."""
    engine = engine_for(model, speculator)
    before = engine.kv.normal_().clone()
    tokens, sampled = torch.tensor([[5, 7, 8, 6, 9]]), torch.tensor([[7, 9, 1, 2, 3]])
    hidden, parent = torch.randn(1, 5, 48), torch.tensor([[0, 0, 1, 0, 1]])
    drafts, choices, states = engine.keep_path(tokens, sampled, hidden, parent, 20)
    assert (drafts.tolist(), choices.tolist()) == ([[7, 9]], [[7, 9, 3]])
    assert torch.equal(states, hidden[:, [0, 1, 4]])
    before[..., 22, :] = before[..., 24, :]
    assert torch.equal(engine.kv, before)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_ragged_prompts_are_prefilled_together(model, speculator, monkeypatch, temperature):
    """Prompts of one token and of several chunks among them: ids are those of each alone."""
    prompts = [[(7 * n + i) % VOCAB for i in range(n)] for n in (3, 40, 1, 8, 9, 2, 10, 1, 17, 5)]
    params = SamplingParams(temperature=temperature, max_tokens=40)
    expected, _, _ = run(engine_for(model), prompts, params, seed=4)
    monkeypatch.setattr(fastspec, "PREFILL_SIZES", (4, 8))
    monkeypatch.setattr(fastspec, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(fastspec, "PREFILL_PER_ROW", 1)
    engine, chunks = engine_for(model, speculator, batch_size=10), []
    prefill_chunk = engine.prefill_chunk

    def noting(tokens, start, *rest):
        chunks.append((start, *tokens.shape))
        return prefill_chunk(tokens, start, *rest)

    engine.prefill_chunk = noting
    assert run(engine, prompts, params, seed=4)[0] == expected
    # All but the last token: 39, 8, 9 and 16 by themselves in chunks of at most 8; then the
    # longest of the others, 5 and 8, as two of 8 fit into 16, and 1, 1, 2 and 3 together.
    alone = [*((at, 1, 8) for at in (0, 8, 16, 24)), (32, 1, 7)]
    alone += [(0, 1, 8), (0, 1, 8), (8, 1, 1), (0, 1, 8), (8, 1, 8)]
    assert chunks == [*alone, (0, 2, 7), (0, 4, 2)]


def test_the_first_step_drafts_from_the_state_before_the_prompts_last_token(
    model, llama_dir, monkeypatch
):
    """transformers' one, whether a prompt is cached beside others, in chunks or on top of what the
    row holds; of a prompt of one token its own."""
    from transformers import LlamaModel

    reference = LlamaModel.from_pretrained(llama_dir)
    monkeypatch.setattr(fastspec, "PREFILL_SIZES", (4, 8))
    engine, params = engine_for(model, batch_size=5), SamplingParams(temperature=0)
    for more in ([], [50, 51, 52]):
        prompts = [[*prompt, *more] for prompt in PROMPTS]
        requests = [Request(p, params, 0, [], goes_on=bool(more)) for p in prompts]
        engine.prefill(range(5), requests)
        for prompt, found in zip(prompts, engine.hidden, strict=True):
            with torch.inference_mode():
                cached = torch.tensor([prompt[: max(len(prompt) - 1, 1)]])
                expected = reference(cached).last_hidden_state[0, -1]
            # States of about 1; float32 sums in another order differ by some 1e-6 a layer.
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_by_itself_is_padded_to_a_captured_size(model, speculator, greedy):
    """With stand-ins for CUDA graphs: what a replay computes depends on its static tensors alone,
    and what the last one left in them does not matter."""
    engine, replays = engine_for(model, speculator), []

    class Graph:
        def __init__(self, size):
            self.tokens = torch.full((1, size), 96)
            self.row, self.last = torch.zeros(2, 1, dtype=torch.int64)
            self.hidden = torch.zeros(1, 48)

        def replay(self):
            replays.append(self.tokens.shape[1])
            empty = engine.kv[:, :, :1, :, :0]
            hidden = engine.prefill_chunk(self.tokens, 0, self.row, empty, self.last)
            self.hidden.copy_(hidden)

    for size in (4, 39):
        graph = Graph(size)
        engine.prefill_graphs[size] = (graph, graph.tokens, graph.row, graph.last, graph.hidden)
    for count in range(2):
        assert run(engine, PROMPTS)[0] == greedy
        assert replays == [4, 39, 4, 39, 4] * (count + 1)


@pytest.mark.parametrize("ahead", [0, 1])
def test_launches_queued_behind_the_result_that_is_read(model, speculator, greedy, ahead):
    """On a GPU one step is queued when the one before is read."""
    engine, launched, read = engine_for(model, speculator, batch_size=2), [], []
    step, wait = engine.step, engine.wait
    engine.ahead = ahead
    engine.step = lambda *flags: launched.append("step") or step(*flags)
    engine.wait = lambda packet: read.append(len(launched)) or wait(packet)
    assert run(engine, PROMPTS)[0] == greedy
    # The n-th result is read with n + ahead launches made; what is left at the end is drained.
    assert read[: len(read) - ahead] == [n + 1 + ahead for n in range(len(read) - ahead)]
    assert len(read) == len(launched)


def test_one_engine_refuses_two_runs_at_a_time(model, speculator, greedy):
    """They would share rows; once the first is closed, the next one runs."""
    engine = engine_for(model, speculator)
    requests = [Request(PROMPTS[0], SamplingParams(temperature=0, max_tokens=9), 0, [])]
    first = decode_loop(engine, requests)
    next(first)
    with pytest.raises(ValueError, match="this engine is generating already"):
        next(decode_loop(engine, requests))
    first.close()
    assert run(engine, PROMPTS)[0] == greedy


@pytest.mark.parametrize("noisy", [False, True])
def test_step_is_one_graph(model, speculator, noisy):
    """Dynamo traces the step without a break (fullgraph), and the traced step gives equal ids."""
    params = SAMPLED[2] if noisy else SamplingParams(temperature=0, max_tokens=40)
    expected, _, _ = run(engine_for(model, speculator, batch_size=2), PROMPTS[:2], params)
    engine = engine_for(model, speculator, batch_size=2)
    engine.compiled_step = torch.compile(engine.decode_step, fullgraph=True, backend="eager")
    engine.compiled = True
    engine.warm = {(noisy, noisy)}
    torch._dynamo.utils.counters.clear()
    tokens, _, _ = run(engine, PROMPTS[:2], params)
    assert tokens == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- gpt_bigcode: learned positions, of which there are only so many ---------------------------

CONTEXT = 128


@pytest.fixture(scope="module")
def bigcode_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt_bigcode")
    tiny_gpt_bigcode(directory, n_positions=CONTEXT)
    return directory


@pytest.fixture(scope="module")
def full_context(bigcode_dir):
    """What transformers generates greedily after each prompt until no position is left."""
    from transformers import GPTBigCodeForCausalLM

    reference = GPTBigCodeForCausalLM.from_pretrained(bigcode_dir)
    new = {"max_length": CONTEXT, "do_sample": False}
    ids = [reference.generate(torch.tensor([p]), **new)[0, len(p) :].tolist() for p in PROMPTS]
    assert all(len(set(row)) > 20 for row in ids)  # no loops
    return ids


FILL = SamplingParams(temperature=0, max_tokens=None)


@pytest.mark.parametrize("drafts", ["none", "random", "right", "wrong"])
def test_gpt_bigcode_equals_transformers_to_the_last_position(
    drafts, bigcode_dir, full_context, speculator
):
    """At the end candidates stand past the table of positions, as do those of frozen rows."""
    script = script_for(PROMPTS, full_context, CONTEXT)
    speculator = {
        "none": None,
        "random": speculator,
        "right": Scripted(script, VOCAB),
        "wrong": Scripted(script, VOCAB, 1),
    }[drafts]
    model = load_model(bigcode_dir)
    engine = engine_for(model, speculator, batch_size=5, max_seq_len=CONTEXT)
    tokens, steps, _ = run(engine, PROMPTS, FILL)
    assert tokens == full_context
    if drafts in ("right", "wrong"):
        each = 4 if drafts == "right" else 1
        assert steps == [-(-len(row) // each) for row in tokens]


@pytest.mark.parametrize("store", ["safetensors", "bin"])
def test_llm_runs_checkpoints_of_either_form(store, bigcode_dir, full_context, tmp_path):
    """Target and speculator from a directory each, ids in and out."""
    target, speculator = tmp_path / "target", tmp_path / "speculator"
    shutil.copytree(bigcode_dir, target)
    tiny_speculator(speculator)
    if store == "bin":
        for directory in (target, speculator):
            store_as_bin(directory, load_file(directory / "model.safetensors"), shards=2)
    llm = LLM(target, {"model": speculator}, dtype="float32", device="cpu", batch_size=2)
    assert llm.engine.max_seq_len == CONTEXT
    outputs = llm.generate(PROMPTS, FILL)
    assert [output.outputs[0].token_ids for output in outputs] == full_context


def test_gpt_bigcode_step_is_one_graph(bigcode_dir, full_context, speculator):
    engine = engine_for(load_model(bigcode_dir), speculator, max_seq_len=CONTEXT)
    engine.compiled_step = torch.compile(engine.decode_step, fullgraph=True, backend="eager")
    engine.compiled, engine.warm = True, {(False, False)}
    torch._dynamo.utils.counters.clear()
    assert run(engine, PROMPTS[:1], FILL)[0] == full_context[:1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- linear layers as the CPU's libraries pack them ---------------------------------------------

CPU = torch.device("cpu")
packing = pytest.mark.skipif(
    not packs_linears(CPU, torch.float32, False), reason="nothing is packed on this machine"
)


def count(module, kind):
    return sum(isinstance(m, kind) for m in module.modules())


@packing
@pytest.mark.parametrize("kind", [PackedLinear, HalfLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3), (1, 1), (1, 130)])
@pytest.mark.parametrize(("wide", "out"), [(48, 97), (33, 7), (576, 960)])
def test_packed_linear_equals_the_plain_one(wide, out, rows, bias, kind):
    """Also for an input that is not contiguous, as the last of many hidden states is."""
    torch.manual_seed(0)
    linear = nn.Linear(wide, out, bias=bias).requires_grad_(False)
    linear.weight.copy_(linear.weight.half())  # numbers that either layout holds exactly
    packed = kind(linear)
    for x in (torch.randn(*rows, wide), torch.randn(*rows[:-1], 2 * rows[-1], wide)[..., ::2, :]):
        # A float32 sum of n terms, in whatever order, is off by n * eps / 2 of its terms' sizes at
        # most; both results are such sums.
        sizes = nn.functional.linear(
            x.abs(), linear.weight.abs(), linear.bias.abs() if bias else None
        )
        limit = (wide + 1) * torch.finfo(torch.float32).eps * sizes
        y, expected = packed(x), linear(x)
        assert y.shape == expected.shape == (*x.shape[:-1], out)
        assert ((y - expected).abs() <= limit).all()
        assert (expected.abs() > 100 * limit).any()  # the limit means something


@pytest.fixture(scope="module")
def packed_pair(llama_dir, speculator_dir):
    """The target's in oneDNN's layout, since its weights are no float16 numbers."""
    pair = nn.ModuleList([load_model(llama_dir), load_speculator(speculator_dir)])
    pack_linears(pair[0], exact=True)
    pack_linears(pair[1], exact=False)
    assert count(pair, nn.Linear) == count(pair, HalfLinear) == count(pair, nn.RMSNorm) == 0
    assert count(pair[1], PackedLinear) == 0
    return pair


@packing
def test_a_draft_of_no_numbers_is_a_draft():
    """A speculator whose states overflow drafts nonsense; it does not end the run."""
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert ByteLinear(nn.Linear(4, 3).requires_grad_(False))(x).shape == (2, 3)


@packing
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_byte_linear_rounds_as_its_bits_say(rows, bias):
    """Rows of very different sizes, one of zeros: each weight is off by half a step of its row's
    scale at most, each input by one step of its range (which includes zero)."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 33, bias=bias).requires_grad_(False)
    linear.weight.mul_(torch.logspace(-3, 3, 33)[:, None])[7] = 0
    x, weight = torch.randn(*rows, 96), linear.weight.clone()
    expected, got = linear(x), ByteLinear(linear)(x)
    step, scale = (x.max() - x.min()) / 127, weight.abs().amax(1) / 127
    limit = (x.abs().sum(-1, keepdim=True) + 96 * step) * scale / 2 + step * weight.abs().sum(1)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= 1.01 * limit + 1e-5 * expected.abs()).all()
    large = expected.abs() > limit
    assert large.any() and (large | (weight == 0).all(1)).float().mean() > 0.3


def test_a_later_torch_may_lack_8_bits(speculator_dir, monkeypatch):
    monkeypatch.delattr(torch, "quantize_per_channel")
    speculator = load_speculator(speculator_dir)
    heads = count(speculator, nn.Linear)
    pack_linears(speculator, exact=False)
    assert count(speculator, HalfLinear) == heads > 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("norm", [nn.RMSNorm(48, eps=1e-5), LayerNorm(48)])
def test_brief_norm_equals_the_plain_one(norm, size):
    torch.manual_seed(0)
    for p in norm.requires_grad_(False).parameters():
        p.normal_()
    for x in (size * torch.randn(2, 3, 48), torch.zeros(1, 1, 48)):
        # With a bias the sum may cancel.
        atol = 1e-6 if isinstance(norm, LayerNorm) else 0
        torch.testing.assert_close(BriefNorm(norm)(x), norm(x), rtol=1e-5, atol=atol)


@packing
def test_float16_holds_what_it_holds_exactly(llama_dir):
    """A target with float16 numbers as weights gives the text that it gave; one weight that is
    none keeps its layer in float32."""
    model = load_model(llama_dir)
    for p in model.parameters():
        p.copy_(p.half())
    expected = run(engine_for(model), PROMPTS)[0]
    model.layers[0].mlp.w2.weight[3, 5] = 1 + 2**-12
    pack_linears(model, exact=True)
    assert count(model, HalfLinear) == 3 * 4 and count(model, PackedLinear) == 1
    assert type(model.layers[0].mlp.w2) is PackedLinear
    model = load_model(llama_dir)
    for p in model.parameters():
        p.copy_(p.half())
    pack_linears(model, exact=True)
    assert run(engine_for(model), PROMPTS)[0] == expected


@packing
@pytest.mark.parametrize(("k", "batch_size"), [(0, 1), (0, 5), (2, 2), (3, 1), (3, 5)])
def test_packed_greedy_equals_transformers(packed_pair, greedy, k, batch_size):
    tokens, _, _ = run(engine_for(*packed_pair, k, batch_size=batch_size), PROMPTS)
    assert tokens == greedy


@packing
def test_packed_same_seed_same_text(model, speculator, packed_pair):
    """Whatever the speculation and the batch, and as with plain linear layers."""
    expected, _, _ = run(engine_for(model, speculator), PROMPTS, SAMPLED[2], seed=11)
    for k, batch_size in [(0, 1), (3, 1), (2, 3)]:
        engine = engine_for(*packed_pair, k, batch_size=batch_size)
        assert run(engine, PROMPTS, SAMPLED[2], seed=11)[0] == expected, (k, batch_size)


@packing
def test_each_weight_is_freed_as_it_is_packed(llama_dir, speculator_dir, monkeypatch):
    """Of the plain weights one is left fewer at each packing, and none at the end."""
    pair = nn.ModuleList([load_model(llama_dir), load_speculator(speculator_dir)])
    plain = [weakref.ref(m.weight) for m in pair.modules() if isinstance(m, nn.Linear)]
    left = []

    def watched(kind):
        def pack(linear):
            left.append(sum(ref() is not None for ref in plain))
            return kind(linear)

        return pack

    for kind in (PackedLinear, HalfLinear, ByteLinear):
        monkeypatch.setattr(fastspec, kind.__name__, watched(kind))
    pack_linears(pair[0], exact=True)
    pack_linears(pair[1], exact=False)
    assert left == list(range(len(plain), 0, -1))
    assert not any(ref() is not None for ref in plain)


@packing
def test_llm_packs_and_keeps_a_tied_embedding(tmp_path, speculator_dir):
    reference = tiny_llama(tmp_path, tie_word_embeddings=True)
    llm = LLM(tmp_path, {"model": speculator_dir}, dtype="float32", device="cpu", batch_size=2)
    layers, heads = 3 * 4 + 1, 3 * 2  # wqkv, wo, w13, w2 and the output; proj and head
    assert (count(llm.engine, PackedLinear), count(llm.engine, ByteLinear)) == (layers, heads)
    assert count(llm.engine, nn.Linear) == 0
    assert torch.equal(llm.engine.model.embed.weight, reference.model.embed_tokens.weight)
    ids = reference.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=40, do_sample=False)
    output = llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=40))[0]
    assert output.outputs[0].token_ids == ids[0, len(PROMPTS[0]) :].tolist()


@pytest.mark.parametrize("changed", ["dtype", "compile", "device", "capability", "build"])
def test_what_did_not_gain_is_not_packed(changed, llama_dir, monkeypatch):
    if changed == "dtype":
        assert count(LLM(llama_dir, dtype="bfloat16", device="cpu").engine, PackedLinear) == 0
    elif changed == "compile":
        assert count(load(llama_dir, compile=True).engine, PackedLinear) == 0
    elif changed == "device":
        assert not packs_linears(torch.device("cuda"), torch.float32, False)
    elif changed == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert count(load(llama_dir).engine, PackedLinear) == 0
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", object())
        assert count(load(llama_dir).engine, PackedLinear) == 0


def test_memory_counts_the_copy_of_a_tied_table(tmp_path, monkeypatch):
    tiny_llama(tmp_path, tie_word_embeddings=True)
    args = ModelArgs.from_config(read_json(tmp_path / "config.json"))
    held = sum(p.nbytes for p in load_model(tmp_path).parameters())
    table = 97 * 48 * 4
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, room))
    for packed, needed in ((False, held), (True, held + table)):
        room = needed
        check_memory(args, None, (0,), torch.float32, CPU, packed)
        room = needed - 1
        with pytest.raises(ValueError, match="do not fit"):
            check_memory(args, None, (0,), torch.float32, CPU, packed)
