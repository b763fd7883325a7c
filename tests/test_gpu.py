"""What holds only on a GPU: one graph replay per step, no late compilation, one width in bf16."""

import pytest
import torch
from conftest import Scripted, launches, run_requests, runs_of_one_graph

from fastspec import Engine, Request, SamplingParams, decode_loop
from model import ModelArgs, Transformer, rope_frequencies
from speculator import MLPSpeculator, SpeculatorArgs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ARGS = ModelArgs(256, 4, 8, 2, 64, 512, 4000)
SPECULATOR = SpeculatorArgs(256, 128, 3, 4000)


def fill(module, std=0.08):
    """Random bfloat16 weights on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    module = module.to("cuda", torch.bfloat16).requires_grad_(False)
    for name, param in module.named_parameters():
        if "norm" not in name and not name.startswith("ln"):
            param.normal_(0, std, generator=generator)
    return module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = fill(Transformer(ARGS))
    model.inv_freq = rope_frequencies(ARGS).cuda()  # float32 in every dtype
    return model


TREE = {"tree": 16, "top_k_tokens_per_head": (4, 3, 2)}


@pytest.fixture
def engine(model, request):
    """Of a chain, or with the options of the test's parameter."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"num_draft_tokens": 3, "batch_size": 2, "max_seq_len": 2048, "compiled": True}
    options |= getattr(request, "param", {})
    return Engine(model, fill(MLPSpeculator(SPECULATOR)), **options)


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ARGS.vocab_size, (length,), generator=generator).tolist()


def run(engine, prompts, params):
    requests = [Request(p, params, 7 + i, []) for i, p in enumerate(prompts)]
    tokens, _, accepted = run_requests(engine, requests)
    return tokens, sum(accepted)


def compiled_so_far():
    """Traced graphs, skipped CUDA graphs, recorded CUDA graphs."""
    counters = torch._dynamo.utils.counters
    manager = torch._inductor.cudagraph_trees.get_manager(0, create_if_none_exists=False)
    recorded = len([node for nodes in manager.roots.values() for node in nodes])
    return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"], recorded


@pytest.mark.parametrize("engine", [{}, TREE], ids=["chain", "tree"], indirect=True)
@pytest.mark.parametrize("noisy", [False, True])
def test_step_is_a_single_graph_replay(engine, noisy):
    params = SamplingParams(temperature=0.8 * noisy, top_p=0.9, max_tokens=500)
    engine.warm_up(noisy, int(noisy))
    engine.prefill([0], [Request(prompt(20), params, 0, [])])
    assert launches(engine, noisy) == {"cudaGraphLaunch": 5}
    assert compiled_so_far() == (1, 0, 1)


def test_no_prompt_length_compiles_or_captures_anything(engine):
    engine.warm_up(False, 0)
    before, graphs = compiled_so_far(), list(engine.prefill_graphs)
    params = SamplingParams(temperature=0, max_tokens=4)
    for length in [*range(1, 20), 63, 64, 65, 255, 256, 257, 1000, 1023, 1024, 1025, 1500, 2000]:
        run(engine, [prompt(length)], params)
        run(engine, [prompt(length), prompt(30)], params)
    for length in (100, 100, 300):  # from nothing, from all but two, from what the row holds
        request = Request(prompt(300)[:length], params, 0, [], goes_on=True)
        assert sum(len(event.tokens) for event in decode_loop(engine, [request])) == 4
    assert compiled_so_far() == before and list(engine.prefill_graphs) == graphs


@pytest.mark.parametrize("lengths", [(1, 1), (20, 1), (20, 30), (64, 1500), (1024, 1025)])
def test_a_prefill_of_fresh_rows_never_waits_for_the_device(engine, lengths):
    """torch raises at every call that would."""
    engine.warm_up(False, 0)
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=4)
    requests = [Request(prompt(length), params, 0, []) for length in lengths]
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.prefill([0, 1], requests)
        engine.prefill([1], requests[:1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.length.tolist() == [lengths[0], lengths[0]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chain_text_is_bit_identical_to_the_always_wrong_speculator_in_bf16(model, temperature):
    """The same graph, with the drafts as data: always wrong, then right, then right at times."""
    torch._dynamo.reset()
    scripted = Scripted(torch.zeros(2, 1024, dtype=torch.int64), ARGS.vocab_size).cuda()
    engine = Engine(
        model, scripted, num_draft_tokens=3, batch_size=2, max_seq_len=1024, compiled=True
    )
    params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=1000)
    prompts = [prompt(30, seed=1), prompt(7, seed=2)]
    wrong, *others = runs_of_one_graph(engine, prompts, lambda: run(engine, prompts, params))
    expected, accepted = wrong
    assert accepted == 0 and len(set(expected[0])) > 100
    for tokens, accepted in others:
        assert tokens == expected and accepted > 900
