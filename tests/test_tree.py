"""Candidate trees: their shape, the path that is accepted, and text that no tree changes."""

import math
import types

import pytest
import torch
from conftest import (
    Scripted,
    assert_one_line,
    greedy,
    load,
    run_main,
    run_requests,
    script_for,
    tiny_gpt_bigcode,
    tiny_speculator,
)

import fastspec
from fastspec import Engine, Request, SamplingParams, accepted_path, decode_loop, lineage
from model import load_model
from speculator import MLPSpeculator, SpeculatorArgs, load_speculator, top_children

VOCAB, NEW = 97, 60
PROMPTS = [[5, 6, 7], [1] * 40, [9, 8], [3, 4, 5, 6, 11, 12, 13], [2]]


# ---- the shape of a tree ----


def speculator_of(logits):
    """A speculator of 3 heads whose logits [B, C, 20] after a path of tokens [B, C, i] are given
    by logits(path): the state it carries is the path."""
    args = SpeculatorArgs(emb_dim=1, inner_dim=1, n_predict=3, vocab_size=20)
    model = MLPSpeculator(args)

    def step(self, i, state, token):
        path = torch.cat((state[..., 1 if i == 0 else 0 :], token[..., None].float()), dim=-1)
        return path, logits(path)

    model.step = types.MethodType(step, model)
    return model


def hashed(path, scale=3.0):
    """Random logits [B, C, 20], a function of each path alone."""
    keys = (path.long() * torch.tensor([7, 331, 5003])[: path.shape[-1]]).sum(-1).flatten()
    rows = [torch.randn(20, generator=torch.Generator().manual_seed(int(key))) for key in keys]
    return scale * torch.stack(rows).view(*path.shape[:-1], 20)


LOGITS = {
    "random": hashed,
    "peaked": lambda path: hashed(path, 40.0),
    "tied": lambda path: torch.zeros(*path.shape[:-1], 20),
    "rounded": lambda path: hashed(path).round(),
    # Log-probabilities of exactly 0, and others far beyond what exp can tell apart.
    "saturated": lambda path: hashed(path).sign() * 1e4,
    "one": lambda path: 1e30 * (torch.arange(20) == 7).expand(*path.shape[:-1], -1),
    "infinite": lambda path: torch.where(hashed(path) > 0, hashed(path), -torch.inf),
    "nan": lambda path: torch.full((*path.shape[:-1], 20), torch.nan),
}
SHAPES = [((4, 3, 2), 5), ((4, 3, 2), 16), ((4, 3, 2), 41), ((1, 5, 1), 9), ((6, 1, 3), 12)]
ROOTS = torch.tensor([3, 0, 19, 8])


def tree_of(logits, top_k, nodes, **options):
    hidden, position = torch.zeros(4, 1), torch.arange(4)
    return speculator_of(logits).draft_tree(hidden, ROOTS, position, top_k, nodes, **options)


@pytest.mark.parametrize(("top_k", "nodes"), SHAPES)
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_a_tree_is_closed_under_parents(logits, top_k, nodes):
    """The root comes first and each parent before its children, whatever the logits are; no two
    children of a node share a token; no node has more children than its head gives."""
    tokens, parent = tree_of(logits, top_k, nodes)
    assert tokens.shape == parent.shape == (4, nodes)
    assert torch.equal(tokens[:, 0], ROOTS) and (parent[:, 0] == 0).all()
    assert ((parent >= 0) & (parent < torch.arange(nodes)))[:, 1:].all()
    _, depth = lineage(parent, len(top_k))
    assert (depth[:, 1:] == depth.gather(1, parent)[:, 1:] + 1).all()
    for row in range(4):
        children = [(int(parent[row, n]), int(tokens[row, n])) for n in range(1, nodes)]
        assert len(set(children)) == nodes - 1
        for p, _ in children:
            assert sum(q == p for q, _ in children) <= top_k[depth[row, p]]


def paths_of(tokens, parent):
    """The tokens from the root to each node, for one row."""
    paths = [(int(tokens[0]),)]
    for token, p in zip(tokens[1:].tolist(), parent[1:].tolist(), strict=True):
        paths.append((*paths[p], token))
    return paths


@pytest.mark.parametrize(("top_k", "nodes"), SHAPES)
def test_a_tree_holds_the_likeliest_paths(top_k, nodes):
    """Those of the whole expansion, which is written out here in float64; no two of its scores
    are closer than float32 can tell."""
    tokens, parent = tree_of(hashed, top_k, nodes)
    for row, root in enumerate(ROOTS.tolist()):
        level = every = [((root,), 0.0)]
        for k in top_k:
            children = []
            for path, score in level:
                gain = hashed(torch.tensor([[path]]))[0, 0].double().log_softmax(-1)
                best = gain.argsort(descending=True)[:k].tolist()
                children += [((*path, t), score + float(gain[t])) for t in best]
            level, every = children, every + children
        expected = [path for path, _ in sorted(every, key=lambda pair: -pair[1])[:nodes]]
        assert paths_of(tokens[row], parent[row]) == expected


@pytest.mark.parametrize("options", [{}, {"tie_weights": True}, {"draft_vocab_size": 40}])
def test_a_tree_with_one_branch_is_the_chain(speculator_dir, options):
    """To the bit, with draft vocabularies and scored with noise too: the first of many children
    is what the chain drafts."""
    torch.manual_seed(0)
    args = SpeculatorArgs(48, 32, 3, VOCAB, **options)
    model = MLPSpeculator(args).requires_grad_(False)
    if args.draft_vocab_size:
        model.set_draft_ids(torch.arange(5, 85, 2))
    hidden, token, position = torch.randn(6, 48), torch.arange(6), torch.arange(6)

    def score(logits, position, ids):
        return logits + torch.cos(position[:, None, None] * torch.arange(logits.shape[-1]))

    def choose(logits, position, ids):
        return score(logits[:, None], position, ids).argmax(-1)[:, 0], True

    chain = model.draft(hidden, token, position, 3, choose)
    tokens, parent = model.draft_tree(hidden, token, position, (1, 1, 1), 4, score)
    assert torch.equal(tokens, torch.cat((token[:, None], chain), dim=1))
    assert parent.tolist() == [[0, 0, 1, 2]] * 6
    tokens, parent = model.draft_tree(hidden, token, position, (3, 2, 2), 22, score)
    for row in range(6):
        assert (int(token[row]), *chain[row].tolist()) in paths_of(tokens[row], parent[row])


def test_top_children_are_sorted_and_ties_go_to_the_lowest_column():
    scores = torch.tensor([[[1.0, 3.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    columns, gain = top_children(scores, 4)
    assert columns.tolist() == [[[1, 3, 2, 4], [0, 1, 2, 3]]]
    expected = scores.log_softmax(-1).gather(-1, columns)
    torch.testing.assert_close(gain, expected)  # float32, summed in another order
    assert math.isclose(float(gain[0, 1].exp().sum()), 0.8, rel_tol=1e-6)


# ---- the path that is accepted ----

#             0
#          1     2        tokens 10 + node
#        3   4     5
#        6
PARENT = torch.tensor([[0, 0, 0, 1, 1, 2, 3]])


def test_lineage():
    ancestors, depth = lineage(PARENT, 3)
    seen = [row.nonzero()[:, 0].tolist() for row in ancestors[0]]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 1, 3, 6]]
    assert depth.tolist() == [[0, 1, 1, 2, 2, 2, 3]]


@pytest.mark.parametrize(
    ("sampled", "path"),
    [
        ([11, 13, 0, 16, 0, 0, 0], [0, 1, 3, 6]),
        ([11, 14, 0, 16, 0, 0, 0], [0, 1, 4, 0]),
        ([12, 13, 15, 16, 0, 0, 0], [0, 2, 5, 0]),
        ([12, 13, 11, 16, 0, 0, 0], [0, 2, 0, 0]),  # right beyond a wrong one, on another branch
        ([10, 13, 15, 16, 0, 0, 0], [0, 0, 0, 0]),  # the root's own token again
        ([11, 10, 10, 10, 10, 10, 10], [0, 1, 0, 0]),
    ],
)
def test_accepted_path(sampled, path):
    tokens = 10 + torch.arange(7)[None]
    ancestors, depth = lineage(PARENT, 3)
    got = accepted_path(tokens, torch.tensor([sampled]), PARENT, ancestors, depth, torch.arange(4))
    assert got.tolist() == [path]


# ---- the engine ----


def engine_for(model, speculator=None, top_k=(4, 3, 2), tree=0, **options):
    options = {"max_seq_len": 128, "batch_size": 5} | options
    engine = Engine(
        model,
        speculator,
        num_draft_tokens=len(top_k),
        tree=tree,
        top_k_tokens_per_head=top_k,
        **options,
    )
    engine.ahead = 1  # as on a GPU
    return engine


def run(engine, params=None, prompts=PROMPTS, stop_ids=(), seed=0):
    """Token ids of each prompt, and each one's count of decode steps and accepted drafts."""
    params = params or SamplingParams(temperature=0, max_tokens=NEW)
    return run_requests(engine, [Request(p, params, seed, list(stop_ids)) for p in prompts])


@pytest.fixture(scope="module")
def plain(llama_dir):
    """What transformers generates greedily after each prompt."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(llama_dir)
    new = {"max_new_tokens": 128, "do_sample": False}
    return [reference.generate(torch.tensor([p]), **new)[0, len(p) :].tolist() for p in PROMPTS]


TREES = [((4, 3, 2), 5), ((4, 3, 2), 41), ((1, 1, 1), 4), ((2, 5), 9), ((30,), 31), ((1, 4, 1), 8)]


@pytest.mark.parametrize(
    ("top_k", "tree", "batch_size"), [(*TREES[0], 1), *((*t, b) for t in TREES for b in (2, 5))]
)
def test_greedy_equals_transformers(model, speculator, plain, top_k, tree, batch_size):
    engine = engine_for(model, speculator, top_k, tree, batch_size=batch_size)
    assert run(engine)[0] == [answer[:NEW] for answer in plain]


SAMPLED = {
    "hot": SamplingParams(temperature=2.0, max_tokens=NEW),
    "top_p": SamplingParams(temperature=0.7, top_p=0.9, max_tokens=25),
    "all": SamplingParams(temperature=1.0, min_p=0.05, top_p=0.95, top_k=30, max_tokens=25),
}


@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED)
def test_same_seed_same_text_plain_chain_or_tree(model, speculator, params):
    expected, _, _ = run(engine_for(model), params, seed=11)
    chain, steps, _ = run(engine_for(model, speculator), params, seed=11)
    assert chain == expected
    for (top_k, tree), batch_size in zip(TREES, [1, 2, 5, 3, 5, 2], strict=True):
        engine = engine_for(model, speculator, top_k, tree, batch_size=batch_size)
        tokens, tree_steps, _ = run(engine, params, seed=11)
        assert tokens == expected, (top_k, tree, batch_size)
        if (top_k, tree) == ((1, 1, 1), 4):  # the chain: every step accepts what it did
            assert tree_steps == steps


def test_a_tree_accepts_more_than_the_chain(model, speculator):
    """Noise shared between draft and target makes even a random speculator agree at T = 2."""
    _, chain, _ = run(engine_for(model, speculator), SAMPLED["hot"])
    _, tree, accepted = run(engine_for(model, speculator, tree=41), SAMPLED["hot"])
    assert sum(tree) < sum(chain)
    assert sum(accepted) >= 5 * NEW - sum(tree)  # a last step may have no room for its own token


def test_gpt_bigcode(tmp_path, speculator):
    """Learned positions: siblings share theirs; candidates beyond the last are clamped."""
    tiny_gpt_bigcode(tmp_path)
    model = load_model(tmp_path)
    params = SamplingParams(temperature=1.5, max_tokens=None)
    expected, _, _ = run(engine_for(model), params)
    assert run(engine_for(model, speculator, tree=16), params)[0] == expected
    assert [len(p) + len(t) for p, t in zip(PROMPTS, expected, strict=True)] == [128] * 5


@pytest.mark.parametrize("options", [{"tie_weights": True}, {"n_predict": 5}])
def test_other_speculators(model, plain, tmp_path, options):
    """Tied heads; more heads than the tree has levels."""
    heads = options.get("n_predict", 3)
    tiny_speculator(tmp_path, top_k_tokens_per_head=[2] * heads, **options)
    engine = engine_for(model, load_speculator(tmp_path), (2,) * 3, 10)
    assert run(engine)[0] == [answer[:NEW] for answer in plain]


class ScriptedTree(Scripted):
    """Scripted's draft at every depth among wrong siblings, as child number `branch` of top_k[i];
    only that child has children of its own."""

    def __init__(self, *script, branch=0, **options):
        super().__init__(*script, **options)
        self.branch = branch

    def draft_tree(self, hidden, token, position, top_k, nodes, score, top):
        right = self.draft(hidden, token, position, len(top_k))
        tokens, parents, above, n = [token], [0], 0, 1
        for i, k in enumerate(top_k):
            tokens += [(right[:, i] + j - self.branch) % self.vocab_size for j in range(k)]
            parents += [above] * k
            above, n = n + max(self.branch, 0), n + k
        return torch.stack(tokens, 1), torch.tensor(parents).expand(len(token), -1)


def scripted_engine(model, answers, branch, wrong_every=0, depth=3, rows=slice(None), **options):
    script = script_for(PROMPTS[rows], answers[rows])
    scripted = ScriptedTree(script, VOCAB, wrong_every=wrong_every, branch=branch)
    return engine_for(model, scripted, (3,) * depth, 3 * depth + 1, **options)


@pytest.mark.parametrize("branch", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_right_branch_is_followed_to_its_end(model, plain, branch, depth):
    """Whichever child it is, each step emits depth + 1 tokens: the fewest steps."""
    tokens, steps, _ = run(scripted_engine(model, plain, branch, depth=depth))
    assert tokens == [answer[:NEW] for answer in plain]
    assert steps == [-(-NEW // (depth + 1))] * 5


def test_a_wrong_tree_is_never_accepted(model, plain):
    """The right child is left out: all siblings are others."""
    tokens, steps, accepted = run(scripted_engine(model, plain, branch=-1))
    assert tokens == [answer[:NEW] for answer in plain]
    assert steps == [NEW] * 5 and accepted == [0] * 5


@pytest.mark.parametrize("branch", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 30])
def test_end_of_sequence_anywhere_on_a_path(model, plain, at, branch):
    answer = plain[0]
    at = next(i for i in range(at, NEW) if answer[i] not in answer[:i])
    engine = scripted_engine(model, plain, branch, rows=slice(1), batch_size=1)
    tokens, _, _ = run(engine, prompts=PROMPTS[:1], stop_ids=[answer[at]])
    assert tokens == [answer[: at + 1]]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6])
def test_token_limit_cuts_a_path(model, plain, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    tokens, _, _ = run(scripted_engine(model, plain, branch=1), params)
    assert tokens == [answer[:max_tokens] for answer in plain]


@pytest.mark.parametrize("wrong_every", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_cache_filled_to_the_last_slot(model, plain, wrong_every, batch_size):
    """Full rows stay frozen beside others that go on, and no slot of a neighbour is touched."""
    for n in range(0, 5, batch_size):
        rows = slice(n, n + batch_size)
        options = {"batch_size": batch_size, "max_seq_len": 64}
        engine = scripted_engine(model, plain, 2, wrong_every, rows=rows, **options)
        params = SamplingParams(temperature=0, max_tokens=None)
        tokens, _, _ = run(engine, params, prompts=PROMPTS[rows])
        for prompt, got, expected in zip(PROMPTS[rows], tokens, plain[rows], strict=True):
            assert len(prompt) + len(got) == 64
            assert got == expected[: len(got)]


def test_the_cache_holds_the_accepted_path_alone(model, plain):
    """Slot by slot what a plain run leaves there, up to the rounding of other shapes of product:
    some 1e-6 a layer, at keys and values of up to about 10."""
    engine = scripted_engine(model, plain, branch=1)
    run(engine)
    alone = engine_for(model)
    run(alone)
    for row, prompt in enumerate(PROMPTS):
        used = len(prompt) + NEW - 1  # the last token is not cached
        torch.testing.assert_close(
            engine.kv[:, :, row, :, :used], alone.kv[:, :, row, :, :used], rtol=1e-4, atol=1e-4
        )


def test_rows_are_refilled(model, speculator, plain):
    prompts, lengths = [PROMPTS[i % 5] for i in range(13)], [1 + (i * 37) % 50 for i in range(13)]
    requests = [
        Request(p, SamplingParams(temperature=0, max_tokens=n), 0, [])
        for p, n in zip(prompts, lengths, strict=True)
    ]
    tokens = [[] for _ in prompts]
    for event in decode_loop(engine_for(model, speculator, tree=12, batch_size=3), requests):
        tokens[event.request] += event.tokens
    assert tokens == [plain[i % 5][:n] for i, n in enumerate(lengths)]


# ---- LLM and command line ----


def test_config_and_options_decide_the_tree(llama_dir, speculator_dir):
    def tree(**config):
        config["model"] = str(speculator_dir)  # its config.json says [4, 3, 2]
        llm = fastspec.LLM(llama_dir, config, dtype="float32", device="cpu", load=False)
        return llm.k, llm.tree, llm.top_k_tokens_per_head

    assert tree() == tree(tree=0) == (3, 0, (4, 3, 2))
    assert tree(tree=16) == (3, 16, (4, 3, 2))
    assert tree(tree=64) == (3, 41, (4, 3, 2))  # all there are: 1 + 4 + 12 + 24
    assert tree(tree=16, num_speculative_tokens=2) == (2, 16, (4, 3))
    assert tree(tree=3) == (2, 3, (4, 3, 2))
    assert tree(tree=16, num_speculative_tokens=0) == (0, 0, ())
    assert tree(tree=16, top_k_tokens_per_head=[8, 1, 1]) == (3, 16, (8, 1, 1))
    assert tree(tree=9, top_k_tokens_per_head=[8, 2], num_speculative_tokens=2) == (2, 9, (8, 2))


def test_a_tree_is_usual_where_it_is_more_than_a_chain():
    args = SpeculatorArgs(48, 32, 3, 400, top_k_tokens_per_head=(4, 3, 2))
    assert fastspec.read_tree({}, args, 3, 16) == (16, (4, 3, 2))
    assert fastspec.read_tree({"tree": 0}, args, 3, 16) == (0, (4, 3, 2))
    assert fastspec.read_tree({"tree": 8}, args, 3, 16) == (8, (4, 3, 2))
    assert fastspec.read_tree({}, args, 0, 16) == (0, ())
    chain = SpeculatorArgs(48, 32, 3, 400, top_k_tokens_per_head=(1, 1, 1))
    assert fastspec.read_tree({}, chain, 3, 16) == (0, (1, 1, 1))
    assert fastspec.read_tree({"tree": 16}, chain, 3, 16) == (4, (1, 1, 1))
    long = SpeculatorArgs(48, 32, 9, 400, top_k_tokens_per_head=(2,) * 9)
    assert fastspec.read_tree({}, long, 9, 8) == (0, (2,) * 9)  # it could not hold the chain
    assert fastspec.read_tree({"tree": 8}, long, 9, 8) == (8, (2,) * 9)


def test_the_usual_tree_shrinks_with_the_batch(llama_dir, speculator_dir, monkeypatch):
    def tree(**options):
        config = {"model": str(speculator_dir)}
        return fastspec.LLM(llama_dir, config, dtype="float32", load=False, **options).tree

    assert tree(device="cpu") == 0
    monkeypatch.setattr(fastspec, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(fastspec, "check_memory", lambda *_, **__: None)
    assert [tree(batch_size=rows) for rows in (1, 2, 4, 5)] == [16, 8, 8, 0]
    assert tree(compile=False) == 0


BAD = {
    "tree 1": (["--tree", 1], r"tree must be 0 \(a chain\) or 2 to 64 nodes, found 1"),
    "tree 65": (["--tree", 65], "tree must be 0 .* found 65"),
    "too few": (
        ["--tree", 9, "--top-k-tokens-per-head", "2,2"],
        "top_k_tokens_per_head must be 3 integers of 1 to 400, one for each .* found \\[2, 2\\]",
    ),
    "zero": (["--tree", 9, "--top-k-tokens-per-head", "2,0,1"], "must be 3 integers of 1 to 400"),
    "more than there are": (["--tree", 9, "--top-k-tokens-per-head", "401,1,1"], "1 to 400"),
    "chain": (
        ["--tree", 0, "--top-k-tokens-per-head", "2,2,2"],
        "top_k_tokens_per_head means nothing for a chain: give tree, too",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_one_line(dirs, capsys, options, message):
    base = ["--checkpoint", dirs.random, "--speculator", dirs.draft]
    assert_one_line(run_main(capsys, *base, *options), message)


@pytest.mark.parametrize("option", [["--tree", 8], ["--top-k-tokens-per-head", "2,1"]])
def test_trees_need_a_speculator(dirs, capsys, option):
    result = run_main(capsys, "--checkpoint", dirs.story, *option)
    assert_one_line(result, f"{option[0]} needs --speculator")


def test_command_line_tells_the_story_in_a_tree(dirs, capsys):
    options = ["--checkpoint", dirs.story, "--speculator", dirs.right, "--prompt", "Q"]
    expected = run_main(capsys, *options)
    options += ["--tree", 12, "--top-k-tokens-per-head", "3,2,2"]
    code, out, err = run_main(capsys, *options)
    assert (code, out) == (0, expected[1])
    steps = [line for line in err.splitlines() if line.startswith("tokens per step")]
    assert steps == [line for line in expected[2].splitlines() if line.startswith("tokens per st")]


def test_llm_generates_the_same_text(dirs):
    params = greedy(temperature=0.9, seed=3)
    config = {"tree": 10, "top_k_tokens_per_head": [3, 2, 2]}
    chain = load(dirs.random, dirs.draft).generate(["Q", "one two"], params)
    llm = fastspec.LLM(
        dirs.random, {"model": str(dirs.draft)} | config, dtype="float32", device="cpu"
    )
    trees = llm.generate(["Q", "one two"], params)
    assert [o.outputs[0].token_ids for o in trees] == [o.outputs[0].token_ids for o in chain]
