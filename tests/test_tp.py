"""Several ranks give what one process gives; tests/tp_cases.py is rank 0 of most groups here."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from conftest import answer, greedy, load, tiny_gpt_bigcode, tiny_llama, tiny_speculator
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from tp_cases import SETTINGS, answers, new_llm, two_turns

import tp
from fastspec import Engine, ModelArgs, choose_device, main
from model import Transformer, hf_tensors, load_model
from speculator import MLPSpeculator, SpeculatorArgs

ROOT = Path(__file__).parent.parent
SIZES = (2, 4)
LARGE = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints whose heads (8, of keys and values 2 or 1), channels and tokens 4 ranks can
    share: with 4 there are fewer KV heads than ranks. Of 9, 3 of keys and values, more are made."""
    root = tmp_path_factory.mktemp("tp")
    heads = {"vocab_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    tiny_llama(root / "gqa", **heads)
    biases = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    tiny_llama(root / "biased", **heads, **biases)
    # transformers wants the width to be a multiple of the heads: 3 of 24 are as wide as 9 of 8.
    three = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24}
    tiny_llama(root / "nine", vocab_size=96, attention_bias=True, **three)
    file = root / "nine" / "config.json"
    nine = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    file.write_text(json.dumps(json.loads(file.read_text()) | nine))
    tiny_gpt_bigcode(root / "bigcode", vocab_size=96, n_head=8)
    tiny_speculator(root / "draft", vocab_size=96)
    config, tensors = tiny_speculator(root / "narrow", vocab_size=96)
    ids = torch.arange(0, 96, 2)  # a draft vocabulary of 48
    for i in range(3):
        emb = tensors[f"emb.{i}.weight"]
        tensors[f"emb.{i}.weight"] = torch.cat((emb[ids], emb[:1]))
        tensors[f"head.{i}.weight"] = tensors[f"head.{i}.weight"][ids]
    (root / "narrow" / "config.json").write_text(json.dumps(config | {"draft_vocab_size": 48}))
    save_file(tensors | {"draft_ids": ids.int()}, root / "narrow" / "model.safetensors")
    shutil.copytree(root / "narrow", root / "ranked")  # a rank that no number of ranks divides
    (root / "ranked" / "config.json").write_text(
        json.dumps(config | {"draft_vocab_size": 48, "emb_rank": 5})
    )
    file, generator = root / "ranked" / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for i in range(3):
        tensors[f"emb.{i}.down"] = torch.randn(48, 5, generator=generator)
        tensors[f"emb.{i}.up"] = torch.randn(5, 32, generator=generator) * 0.1
    save_file(tensors, file)
    tiny_llama(root / "ties", **heads)
    file = root / "ties" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:24].repeat(4, 1)
    save_file(tensors, file, metadata={"format": "pt"})
    tiny_llama(root / "large", **(heads | LARGE))
    return root


@pytest.fixture(scope="module", params=SIZES)
def group(request, root):
    """(number of ranks, what they gave, exit code, seconds from its end to the workers')."""
    size = request.param
    command = [sys.executable, str(ROOT / "tests" / "tp_cases.py"), str(size), str(root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.stdout, result.stderr
    results, end = json.loads(result.stdout.splitlines()[-1]), time.monotonic()
    while any(alive(pid) for pid in results["pids"]) and time.monotonic() < end + 30:
        time.sleep(0.1)
    return size, results, result.returncode, time.monotonic() - end


def alive(pid):
    """Not a zombie either: in a container there may be nobody to wait for an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- the same tokens ----


@pytest.mark.parametrize("target", ["gqa", "biased", "nine", "bigcode"])
def test_ranks_give_what_one_process_gives(root, group, target):
    """Ids with speculation off, replicated and sharded, greedy, sampled and filtered; and drafts
    accepted, so that replicated and sharded drafts are those of one process too."""
    size, results, *_ = group
    for draft_size in (0, 1, size):
        llm = new_llm(root / target, root / "draft" if draft_size else None)
        for kind in SETTINGS:
            name = f"{target} {draft_size} {kind}"
            assert results[name] == answers(llm, kind), name
            if kind == "sampled" and draft_size:
                assert sum(sum(accepted) for *_, accepted in results[name]) > 5


@pytest.mark.parametrize("draft", ["narrow", "ranked"])
def test_a_draft_vocabulary_is_shared_too(root, group, draft):
    llm = new_llm(root / "gqa", root / draft)
    for kind in ("greedy", "sampled"):
        assert group[1][f"{draft} {kind}"] == answers(llm, kind)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_trees_are_the_same(root, group, kind):
    expected = answers(new_llm(root / "gqa", root / "draft", tree=9), kind)
    for draft_size in (1, group[0]):
        assert group[1][f"tree {draft_size} {kind}"] == expected


def test_a_conversation_goes_on_in_every_ranks_cache(root, group):
    expected = two_turns(new_llm(root / "gqa", root / "draft"))
    assert group[1]["turns"] == expected
    assert expected[2] > 0  # tokens of the second prompt that were not computed again


def test_the_first_of_equal_tokens_wins(group):
    """Each rank has the same rows of the output layer: rank 0's come first."""
    assert max(max(ids) for ids in group[1]["ties"]) < 24


# ---- ends ----


def test_a_group_goes_on_after_a_stream_was_left_and_after_an_interrupt(root, group):
    size, results, *_ = group
    if size == 2:
        expected = answers(new_llm(root / "gqa", batch_size=2), "greedy")
        assert results["after_close"] == expected
        assert results["after_interrupt"] == expected


def test_no_rank_outlives_rank_0(group):
    """Whether that was killed (of two ranks) or ended."""
    size, _, code, seconds = group
    assert code == (-9 if size == 2 else 0)
    assert seconds < 10


def test_a_checkpoint_that_a_rank_does_not_see_is_its_error(group):
    """Which the ranks survive."""
    size, results, *_ = group
    if size == 4:
        assert results["unseen"].startswith("rank 1: /nowhere: no such directory")


def test_what_ends_a_rank_is_said_by_rank_0(group):
    size, results, *_ = group
    if size == 4:
        message = r"rank [123] has ended with 1: AttributeError: .* no attribute 'nonsense'"
        assert re.fullmatch(message, results["lost"])


SNIPPET = """
from fastspec import LLM, SamplingParams

llm = LLM(
    model={target!r},
    tensor_parallel_size=2,
    speculative_config={{
        "model": {draft!r},
        "draft_tensor_parallel_size": 1,
        "method": "mlp_speculator",
    }},
    {here}
)
params = SamplingParams(temperature=0, max_tokens=12)
for output in llm.generate([[1, 2, 3]], params):
    print(output.outputs[0].token_ids, flush=True)

import os, signal
os.kill(next(iter(llm.ranks.workers.values()))[0].pid, signal.SIGKILL)
llm.generate([[1, 2, 3]], params)
"""


LOST = """
import sys
import tp

tp.WORKER = '''
import os, sys, time
import torch.distributed as dist
import tp

def lost(*args, **options):
    time.sleep(1)
    print("out of threads", file=sys.stderr, flush=True)
    os._exit(1)

dist.init_process_group = lost
port, size, rank = map(int, sys.argv[1:])
tp.work(port, size, rank, None)
'''
tp.start(2)
"""


def test_a_rank_that_is_lost_while_the_group_forms_ends_the_start():
    command = [sys.executable, "-c", LOST]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    assert result.returncode == 1
    assert result.stderr.endswith("fastspec: rank 1 has ended with 1: out of threads\n")


CAUGHT = """
import time
import tp

tp.GRACE = 1
try:
    tp.start(2)
except Exception:
    time.sleep(5)
    print("here", flush=True)
"""


def test_a_start_that_fails_leaves_the_caller_alone():
    """Who may catch the error and go on with one process."""
    result = subprocess.run(
        [sys.executable, "-c", CAUGHT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "none0"},
        timeout=90,
    )
    assert (result.returncode, result.stdout) == (0, "here\n"), result.stderr


def test_the_first_rank_that_was_lost_is_named():
    """Not the one that lost its connection to it."""
    said, codes = io.BytesIO(b"Connection reset by peer\n"), {1: 1, 2: -9, 3: None, 4: 0}
    workers = {r: (SimpleNamespace(poll=lambda c=c: c), said) for r, c in codes.items()}
    assert tp.lost(workers) == "rank 2 has ended with -9: Connection reset by peer"
    del workers[2]
    assert tp.lost(workers).startswith("rank 1 has ended with 1: ")


def test_the_documented_snippet_runs_unguarded_and_a_killed_rank_ends_it(root, tmp_path):
    """A script without a main guard. After its answer, its second rank is killed."""
    here = "dtype='float32', device='cpu'"
    script = tmp_path / "snippet.py"
    target, draft = str(root / "gqa"), str(root / "draft")
    script.write_text(SNIPPET.format(target=target, draft=draft, here=here))
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=90,
    )
    tokens = answer(load(root / "gqa"), [1, 2, 3], greedy(max_tokens=12)).token_ids
    assert result.stdout == f"{tokens}\n", result.stderr
    assert result.returncode == 1
    message = "ConnectionError: rank 1 has ended with -9: it left no message\n"
    assert result.stderr.endswith(message)
    assert time.monotonic() - start < 60  # a start takes about ten seconds here


@pytest.mark.parametrize("size", [1, 2])
def test_under_torchrun_rank_0_prints_what_a_plain_run_does(root, tmp_path, capsys, size):
    """A world of one goes through the same code. The answers are of a file of prompts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [1, 2, 3]}\n{"prompt": [4, 5], "temperature": 1, "seed": 3}\n')
    options = ["--checkpoint", root / "gqa", "--speculator", root / "draft", "--prompts", prompts]
    options += ["--max-new-tokens", 8, "--dtype", "float32", "--device", "cpu"]
    plain, ranks = tmp_path / "plain.jsonl", tmp_path / "ranks.jsonl"
    assert main([*map(str, options), "--output", str(plain)]) == 0
    summary = capsys.readouterr().err
    result = torchrun(size, *options, "--output", ranks)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert ranks.read_text() == plain.read_text()
    # What is printed is the plain run's, but for times.
    assert result.stderr.count("\n") == summary.count("\n"), result.stderr


def test_under_torchrun_rank_0_says_what_is_wrong(llama_dir):
    result = torchrun(2, "--checkpoint", llama_dir, "--prompt", "Q", "--device", "cpu")
    assert result.returncode == 1
    assert result.stderr.count("2 ranks cannot share 6 heads") == 1
    assert "97 tokens evenly; possible: 1\n" in result.stderr


def torchrun(size, *options):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", size, ROOT / "fastspec.py"]
    command = [sys.executable, *map(str, [*command, *options])]
    # A port of its own, should another run be on this machine.
    env = os.environ | {"PET_STANDALONE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)


# ---- what a rank holds ----


def test_each_rank_loads_its_share_and_no_more(root, group):
    """Memory at the peak of loading, beside what the allocator keeps: 20 MB of about 110."""
    size, results, *_ = group
    if size == 4:
        whole = sum(p.nbytes for p in load_model(root / "large").parameters())
        assert max(results["peaks"]) < whole / size + 20e6
        assert results["parameters"]  # plain tensors: static inputs of the step's CUDA graph


@pytest.fixture
def as_rank(monkeypatch):
    """Make this process a rank of a group without the others: enough for meshes and placements."""
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda _, **options: init("fake", **options))

    def become(rank, size):
        if dist.is_initialized():
            dist.destroy_process_group()
        return tp.Ranks(dist.HashStore(), rank, size)

    yield become
    dist.destroy_process_group()


def test_sums_over_more_than_two_ranks_are_in_their_order(as_rank, monkeypatch):
    """Bit for bit as they add up by hand, also of more rows than are summed at once."""
    ranks, parts = as_rank(1, 3), torch.randn(3, 2, tp.SUMMED_ROWS // 2 + 7, 8).bfloat16()
    first = iter(range(0, parts[0, ..., 0].numel(), tp.SUMMED_ROWS))

    def gathered(name, x, size):
        rows = slice(at := next(first), at + len(x))
        assert name == "all_gather_into_tensor" and torch.equal(x, parts[1].flatten(0, 1)[rows])
        return torch.cat([part.flatten(0, 1)[rows] for part in parts])

    monkeypatch.setattr(ranks, "collective", gathered)
    assert torch.equal(ranks.sum(parts[1]), parts[0] + parts[1] + parts[2])


@pytest.mark.parametrize("target", ["gqa", "nine", "bigcode"])
@pytest.mark.parametrize("size", SIZES)
def test_a_part_is_what_torch_says_of_its_placements(root, as_rank, target, size):
    """Pieces of every stored tensor as DTensors: shapes are the whole's, and each rank's memory
    is where torch would have it. To 9 heads, 3 of keys and values, zeros make 12 and 4."""
    args = ModelArgs.from_config(json.loads((root / target / "config.json").read_text()))
    stored = {name: t.clone() for name, t in hf_tensors(Transformer(args)).items()}
    filled = replace(args, n_heads=12, n_kv_heads=4) if target == "nine" else args
    wholes = {name: torch.zeros_like(t) for name, t in hf_tensors(Transformer(filled)).items()}
    for name, tensor in stored.items():
        wholes[name][tuple(map(slice, tensor.shape))] = tensor
    for rank in range(size):
        as_rank(rank, size)
        mesh = tp.new_mesh(args.n_kv_heads, size)
        plan = {"mesh": mesh, "plan": tp.TARGET_PLAN, "head_dim": args.head_dim}
        own_part = partial(tp.part, **plan, n_kv_heads=args.n_kv_heads)
        parts = {name: own_part(name, tensor) for name, tensor in stored.items()}
        local = Transformer(tp.local_args(args, size))
        assert {n: p.shape for n, p in parts.items()} == {
            n: t.shape for n, t in hf_tensors(local).items()
        }
        for name, own in parts.items():
            whole = tp.pieces(name, wholes[name], tp.TARGET_PLAN, args.head_dim)
            for dtensor, (tensor, placements) in zip(
                tp.as_dtensors(name, own, **plan), whole, strict=True
            ):
                assert (dtensor.shape, dtensor.placements) == (tensor.shape, placements)
                shape, offset = compute_local_shape_and_global_offset(
                    tensor.shape, mesh, placements
                )
                view = tensor
                for dim, (length, at) in enumerate(zip(shape, offset, strict=True)):
                    view = view.narrow(dim, at, length)
                if placements == tp.ONCE and rank:
                    view = torch.zeros_like(view)
                assert torch.equal(dtensor.to_local(), view), name


@pytest.mark.parametrize("target", ["gqa", "bigcode"])
def test_a_rank_reads_nothing_of_what_the_others_hold(root, as_rank, target, tmp_path):
    """What ranks 0 and 1 of 4 take from a checkpoint stays what it is when all the rest is NaN,
    which a loader that read it would refuse. (Of a sum's bias only rank 0 has anything.)"""
    shutil.copytree(root / target, tmp_path, dirs_exist_ok=True)
    args = ModelArgs.from_config(json.loads((tmp_path / "config.json").read_text()))
    tensors = load_file(tmp_path / "model.safetensors")
    for rank in (0, 1):
        as_rank(rank, 4)
        mesh = tp.new_mesh(args.n_kv_heads, 4)
        heads = {"head_dim": args.head_dim, "n_kv_heads": args.n_kv_heads}
        own_part = partial(tp.part, mesh=mesh, plan=tp.TARGET_PLAN, **heads)
        kept = {}
        for name, tensor in tensors.items():
            # Where an index is in this rank's part, the value stays.
            index = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            own = own_part(name, index + 1).flatten().long() - 1
            kept[name] = torch.full_like(tensor, torch.nan).flatten()
            own = own[own >= 0]
            kept[name][own] = tensor.flatten()[own]
            kept[name] = kept[name].view(tensor.shape)
        assert any(tensor.isnan().any() for tensor in kept.values())
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        shape = {"local_args": tp.local_args(args, 4), "part": own_part}
        found, expected = (load_model(d, **shape) for d in (tmp_path, root / target))
        for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_the_weights_that_matter_are_sharded(root):
    """All linear layers and the vocabulary: what is left whole is norms and positions."""
    for target in ("gqa", "bigcode"):
        args = ModelArgs.from_config(json.loads((root / target / "config.json").read_text()))
        for name, tensor in hf_tensors(Transformer(args)).items():
            for piece, placements in tp.pieces(name, tensor, tp.TARGET_PLAN, args.head_dim):
                if piece.ndim == 2 and "wpe" not in name and piece.shape[0] != 2 * args.head_dim:
                    assert Shard in map(type, placements), name
    draft = MLPSpeculator(
        SpeculatorArgs.from_config(json.loads((root / "draft" / "config.json").read_text()))
    )
    for name, parameter in draft.named_parameters():
        [(_, placements)] = tp.pieces(name, parameter, tp.DRAFT_PLAN, 0)
        assert (Shard in map(type, placements)) == (parameter.ndim == 2), name


# ---- errors before anything starts ----


@pytest.mark.parametrize(
    ("size", "draft_size", "message"),
    [
        (3, 1, "3 ranks cannot share 8 heads (2 of keys and values), 64 feed-forward channels and "
               "96 tokens evenly; possible: 1, 2, 4, 8"),
        (0, 1, "tensor_parallel_size 0 is not a number of devices"),
        (4, 2, "draft_tensor_parallel_size 2: supported are 1 and tensor_parallel_size 4"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_work_are_refused(root, size, draft_size, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        new_llm(root / "gqa", root / "draft", draft_size, tensor_parallel_size=size)


def test_heads_are_added_only_where_no_key_head_is_on_several_ranks():
    """Two ranks for each of 3 KV heads would have to share 3 query heads."""
    message = "6 ranks cannot share 9 heads (3 of keys and values), 192 feed-forward channels and "
    message += "96 tokens evenly; possible: 1, 2, 3, 4, 8"
    args = ModelArgs(48, 3, 9, 3, 8, 192, 96)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tp.local_args(args, 6)
    counts = [tp.local_args(args, size) for size in (1, 2, 3, 4, 8)]
    assert [(a.n_heads, a.n_kv_heads) for a in counts] == [(9, 3), (6, 2), (3, 1), (3, 1), (3, 1)]


def test_a_speculator_that_ranks_cannot_share_is_refused(root, tmp_path):
    tiny_speculator(tmp_path, vocab_size=96, inner_dim=33)
    message = "2 ranks cannot share the speculator's inner_dim 33 and 96 tokens evenly; use"
    with pytest.raises(ValueError, match=message):
        new_llm(root / "gqa", tmp_path, 2, tensor_parallel_size=2)


def test_more_ranks_than_gpus_are_refused(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("fastspec.choose_device", lambda name: torch.device("cuda"))
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"tensor_parallel_size 4 needs as many GPUs; .* finds 2"):
        new_llm(root / "gqa", tensor_parallel_size=4, device="cuda")


# ---- the step ----


def test_the_step_is_one_graph_that_holds_its_collectives_and_copies_no_weight(root, as_rank):
    """Traced as torch.compile traces it, but not compiled. Weights are inputs of the graph, which
    go straight into products, look-ups and norms; for each layer two sums, and one for the
    embedding; of the drafts and the filtered choice, rank 0's; pairs or channels else."""
    ranks = as_rank(1, 2)
    llm = new_llm(root / "gqa", root / "draft", 2, tensor_parallel_size=2, load=False)
    llm.packed = False
    llm.load_weights(ranks)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        weights = [isinstance(x, torch.nn.Parameter) for x in inputs]
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        readers.update(
            getattr(user.target, "__name__", user.target)
            for node, is_weight in zip(placeholders, weights, strict=True)
            for user in node.users
            if is_weight
        )
        return graph.forward

    readers = set()
    with torch.inference_mode():
        torch.compile(llm.engine.decode_step, backend=keep, fullgraph=True)(None, True, True)
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].nodes]
    kinds = ("all_reduce", "broadcast", "all_gather_into_tensor")
    heads, layers = 3, 3
    assert [sum(kind in name for name in names) for kind in kinds] == [
        2 * layers + 1,
        2,
        2 * heads + 1,
    ]
    # "float" is of the speculator's norms, [W] each.
    assert readers == {"linear", "embedding", "rms_norm", "float"}


def test_a_step_on_gpus_leaves_few_sums_to_nccl(as_rank, monkeypatch):
    """Traced as above, with a GPU's kernels: the sum of the embedding is one of torch's kernels,
    and those of the layers are in ours."""
    gpu_kernels = pytest.importorskip("gpu_kernels", reason="there is no triton for this platform")
    ranks, args = as_rank(1, 2), ModelArgs(128, 2, 4, 2, 64, 128, 96)
    model, draft = (
        Transformer(tp.local_args(args, 2)),
        MLPSpeculator(SpeculatorArgs(128, 64, 3, 96)),
    )
    engine = Engine(model, draft, num_draft_tokens=3, max_seq_len=64, ranks=ranks)
    engine.kernels = gpu_kernels
    gpu_kernels.enroll(model)
    ranks.connect(engine)
    monkeypatch.setitem(tp.one_shot_memory, torch.float32, torch.empty(0))
    monkeypatch.setitem(gpu_kernels.shared_memory, torch.float32, [])
    names = []

    def keep(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return lambda *inputs: ()

    with torch.inference_mode(), suppress(IndexError):  # of what was not computed
        torch.compile(engine.decode_step, backend=keep, fullgraph=True)(None, True, False)
    kinds = ("one_shot_sum", "fastspec.layers", "all_reduce", "broadcast", "all_gather")
    counts = [sum(kind in name for name in names) for kind in kinds]
    assert counts == [1, 1, 0, 1, 1]
