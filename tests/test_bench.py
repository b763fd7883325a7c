"""bench.py on tiny models, in float32 on the CPU: its arithmetic, its rows, its options."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model import BASES, edit_json
from test_speculator import PUBLISHED

import bench
from bench import Weights, Work, run_summary, shape_configs
from fastspec import TARGETS, Engine, pack_linears, packs_linears
from model import ModelArgs, Transformer
from speculator import MLPSpeculator, SpeculatorArgs

ACCELERATORS = {
    "llama2-13b": "llama-13b-accelerator",
    "llama2-70b": "llama2-70b-accelerator",
    "llama3-8b": "llama3-8b-accelerator",
    "llama3-70b": "llama3-70b-accelerator",
    "codellama-34b": "codellama-34b-accelerator",
    "granite-3b": "granite-3b-code-instruct-accelerator",
    "granite-7b": "granite-7b-instruct-accelerator",
    "granite-8b": "granite-8b-code-instruct-accelerator",
    "granite-20b": "granite-20b-code-instruct-accelerator",
}
TINY = ((48, 3, 6, 2, 64, 97, 512), bench.LLAMA, 32, [4, 3, 2], {})
KEYS = {"mode", "nodes", "batch", "prompts", "temperature", "ms_per_step", "draft_ms", "verify_ms"}
KEYS |= {"tokens_per_step", "tokens_per_s", "total_tokens_per_s", "speedup", "floor_ms"}
KEYS |= {"floor_fraction", "gb_per_step", "ttft_ms", "peak_gb"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A ceiling that is known, and measured in no time; a shape that is tiny."""
    monkeypatch.setattr(bench, "measure_ceiling", lambda *_: Work(1e9, 1e12))
    monkeypatch.setattr(bench.fastspec, "BUNDLED", Path("/nowhere"))
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)


@pytest.fixture
def main(capsys):
    """Runs the command line; returns what it printed and the rows of its last line."""

    def run(*argv):
        options = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "16"]
        options += ["--rounds", "1"]
        code = bench.main([*options, *map(str, argv)])
        out, err = capsys.readouterr()
        assert code == 0, err
        document = json.loads(out.splitlines()[-1])
        return out, document, document["rows"]

    return run


@pytest.fixture
def error(capsys):
    def run(*argv):
        assert bench.main(["--device", "cpu", "--dtype", "float32", *map(str, argv)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("bench: ") and err.count("\n") == 1
        return err

    return run


def on_meta(name):
    target, speculator = shape_configs(name).values()
    with torch.device("meta"):
        return (
            Transformer(ModelArgs.from_config(target)).bfloat16(),
            MLPSpeculator(SpeculatorArgs.from_config(speculator)).bfloat16(),
        )


# ---- shapes ----


@pytest.mark.parametrize("name", ACCELERATORS)
def test_shapes_are_the_published_ones(name):
    accelerator = ACCELERATORS[name]
    target, speculator = shape_configs(name).values()
    assert ModelArgs.from_config(target) == BASES[TARGETS[accelerator].rpartition("/")[2]][1]
    args = SpeculatorArgs.from_config(speculator)
    fields = ("emb_dim", "inner_dim", "n_predict", "vocab_size", "tie_weights", "scale_input")
    published = {"tie_weights": False, "scale_input": False} | PUBLISHED[accelerator][0]
    assert {f: getattr(args, f) for f in fields} == {f: published[f] for f in fields}
    children = list(args.top_k_tokens_per_head)  # which three do not publish
    assert children == published.get("top_k_tokens_per_head", [4, 3, 2, 2, 2][: args.n_predict])


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_tied_where_the_shape_is_and_differ_elsewhere(tied, monkeypatch):
    base = bench.GRANITE if tied else bench.LLAMA
    monkeypatch.setitem(bench.SHAPES, "tiny", (TINY[0], base, *TINY[2:]))
    where = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    model, speculator = (bench.random_weights(type(m), m.args, where) for m in on_meta("tiny"))
    assert (model.output.weight is model.embed.weight) is tied
    # 0.02 within six standard errors of 97 * 48 draws' deviation (0.02 / sqrt(2 * 4656) = 0.0002).
    assert abs(model.embed.weight.std() - 0.02) < 0.0013
    assert (model.norm.weight == 1).all() and model.inv_freq.dtype == torch.float32
    assert not torch.equal(speculator.head[0].weight, speculator.head[1].weight)
    assert (speculator.ln[0].weight == 1).all() and (speculator.ln[0].bias == 0).all()


# ---- what a step needs ----


def test_weights_of_a_step_at_llama3_8b():
    """By hand: per layer qkv 4096 x 6144, out 4096 x 4096, gate and up 4096 x 28672, down 14336 x
    4096 and two norms; one more norm and the output layer; no embedding table."""
    model, speculator = on_meta("llama3-8b")
    layer = 4096 * (6144 + 4096 + 28672 + 14336) + 2 * 4096
    numbers = 32 * layer + 4096 + 128256 * 4096
    assert bench.target_weights(model) == (numbers, 2 * numbers)
    assert f"{2 * numbers / 1e9:.3f}" == "15.010"
    first, later = (width * 3072 + 128256 * 3072 + 2 * 3072 for width in (4096, 3072))
    for i, head in enumerate((first, later, later, later)):
        assert bench.head_weights(speculator, i) == (head, 2 * head)


def draft_bytes(speculator):
    return sum(bench.head_weights(speculator, i).nbytes for i in range(speculator.args.n_predict))


# Whole drafts in GB, 16-bit, from widths alone: a tied head is read once per token.
DRAFTS = {"llama2-13b": 0.90, "llama2-70b": 2.63, "llama3-8b": 3.23, "llama3-70b": 8.94}
DRAFTS |= {"codellama-34b": 3.29, "granite-3b": 2.17, "granite-7b": 1.48, "granite-8b": 2.18}
DRAFTS |= {"granite-20b": 1.76}


@pytest.mark.parametrize("name", DRAFTS)
def test_draft_bytes_of_the_nine(name):
    speculator = on_meta(name)[1]
    assert draft_bytes(speculator) / 1e9 == pytest.approx(DRAFTS[name], abs=0.0051)  # two digits


def test_a_tied_table_counts_once_as_the_output_layer():
    model, _ = on_meta("granite-3b")
    everything = sum(p.nbytes for p in model.parameters())
    assert bench.target_weights(model).nbytes == everything


def test_bytes_follow_the_stored_type():
    speculator = on_meta("tiny")[1]
    wide = bench.head_weights(speculator, 0)
    head = speculator.head[0]
    weight = head.weight
    del head.weight
    head.register_buffer("weight", weight.to(torch.int8))
    narrow = bench.head_weights(speculator, 0)
    assert narrow.numbers == wide.numbers and wide.nbytes - narrow.nbytes == 97 * 32


def step_of(model, heads=(), **options):
    """What a step of 2 rows with 50 tokens each needs, of a target with 1000 weights."""
    speculator = torch.nn.Module() if heads else None
    with torch.device("meta"):
        engine = Engine(model, speculator, batch_size=2, max_seq_len=64, **options)
    return bench.step_need(Weights(1000, 2000), list(heads), engine, 50.0)


def test_need_and_floor_by_hand():
    """Cached per token: layers, keys and values, KV heads, width of a head, 2 bytes. A product is
    two operations; scores and values take two products of heads * width each."""
    model, _ = on_meta("tiny")
    cached, attention = 3 * 2 * 2 * 8 * 2, 4 * 2 * 50 * 3 * 6 * 8
    need = step_of(model)
    assert need == (2000 + 2 * 50 * cached, 2 * 2 * 1000 + attention)
    heads = [Weights(100, 150), Weights(30, 40), Weights(7, 7)]
    need = step_of(model, heads, num_draft_tokens=2)  # the third head is not used
    assert need.nbytes == 2000 + 150 + 40 + 2 * 50 * cached
    assert need.flops == 2 * (1000 * 6 + 130 * 2) + 3 * attention
    assert bench.floor_ms(need, Work(1e6, 1e12)) == pytest.approx(21.39)
    assert bench.floor_ms(need, Work(1e12, 1e6)) == pytest.approx(need.flops / 1e3)


def test_a_trees_nodes_are_verified_and_its_heads_read_once():
    """4 children of the root and 3 of each of those, of which a tree of 9 nodes keeps at most 7 at
    depth 2: the heads draft for 1, 4 and 7 nodes."""
    model, _ = on_meta("tiny")
    heads = [Weights(100, 150), Weights(30, 40), Weights(7, 7)]
    chain = step_of(model, heads, num_draft_tokens=3)
    top_k = {"top_k_tokens_per_head": [4, 3, 2]}
    tree = step_of(model, heads, num_draft_tokens=3, tree=9, **top_k)
    assert tree.nbytes == chain.nbytes
    attention = 4 * 2 * 9 * 50 * 3 * 6 * 8
    assert tree.flops == 2 * 2 * (1000 * 9 + 100 + 4 * 30 + 7 * 7) + attention


def test_ranks_need_their_parts_together():
    model, _ = on_meta("tiny")
    one = step_of(model)
    four = step_of(model, ranks=SimpleNamespace(size=4))
    assert four == (4 * one.nbytes, 4 * one.flops)


# ---- runs and rows ----


def test_a_run_by_hand():
    """Gaps of 1, 1, 7 (a prefill) and 2 s: the median is 1.5 s. Two answers of 10 tokens."""
    run = run_summary([0, 1, 2, 9, 11], [0.3, 0.5], [(100, 10, 3), (50, 10, 2)], 20.0)
    assert (run.step_ms, run.ttft_ms, run.tokens, run.steps) == (1500, 400, 20, 5)
    assert run.live == pytest.approx((105 * 3 + 55 * 2) / 5)


def test_answers_too_short_to_time_are_refused():
    """A warm-up may be."""
    run = run_summary([0, 1], [0.3], [(100, 2, 2)], 1.0)
    with pytest.raises(ValueError, match="too short to time"):
        bench.new_row("plain", 1, [run], Work(5e6, 0), Work(1e9, 1e12))


def make_row(step_ms, tokens, steps, nodes):
    runs = [
        run_summary([0, t, 2 * t], [0.1], [(10, tokens, steps)], 2.0) for t in (9, step_ms / 1e3)
    ]
    runs.append(runs[1])  # the median of three rounds is that of two
    return bench.new_row(
        "plain" if nodes == 1 else "chain", nodes, runs, Work(5e6, 0), Work(1e9, 1e12)
    )


def test_rows_by_hand():
    rows = [make_row(10, 50, 50, 1), make_row(12.5, 50, 20, 4)]
    bench.compare(rows, random=False, assumed=3.0)
    plain, chain = rows
    assert plain["ms_per_step"] == pytest.approx(10) and plain["floor_ms"] == pytest.approx(5)
    assert plain["floor_fraction"] == pytest.approx(0.5) and plain["gb_per_step"] == 0.005
    assert (plain["tokens_per_step"], chain["tokens_per_step"]) == (1.0, 2.5)
    assert plain["tokens_per_s"] == pytest.approx(100) and chain["tokens_per_s"] == pytest.approx(
        200
    )
    assert chain["total_tokens_per_s"] == pytest.approx(25)  # 50 tokens in 2 s
    assert (plain["speedup"], chain["speedup"]) == (1.0, pytest.approx(2))
    assert plain["projected_speedup"] is None
    assert chain["projected_speedup"] == pytest.approx(3 * 10 / 12.5)


def test_random_drafts_have_no_speed_up_but_a_projected_one():
    rows = [make_row(10, 50, 50, 1), make_row(12.5, 50, 49, 4)]
    bench.compare(rows, random=True, assumed=2.5)
    assert all(rows[1][key] is None for key in (*bench.NOT_REAL, "speedup"))
    assert rows[1]["projected_speedup"] == pytest.approx(2)
    assert rows[0]["tokens_per_step"] == 1 and rows[0]["speedup"] == 1


def test_the_ceiling_is_measured(monkeypatch):
    monkeypatch.undo()
    ceiling = bench.measure_ceiling(torch.device("cpu"), torch.float32)
    # Any machine that runs this reads 0.2 to 2000 GB/s and multiplies at 1 GFLOP/s to 1 PFLOP/s.
    assert 2e8 < ceiling.nbytes < 2e12 and 1e9 < ceiling.flops < 1e15


# ---- the command line ----


def test_a_shape_from_end_to_end(main):
    out, document, rows = main("--shape", "tiny", "--batch", "1,2", "--prompt-len", "5,9")
    assert [(r["mode"], r["nodes"], r["batch"], r["prompts"]) for r in rows] == [
        (mode, nodes, batch, prompts)
        for batch in (1, 2)
        for prompts in ("5 tokens", "9 tokens")
        for mode, nodes in (("plain", 1), ("chain", 4))
    ]
    assert all(row.keys() == KEYS for row in rows)
    for plain, chain in zip(rows[::2], rows[1::2], strict=True):
        assert plain["tokens_per_step"] == plain["speedup"] == 1
        assert chain["tokens_per_step"] is chain["tokens_per_s"] is chain["speedup"] is None
        assert plain["draft_ms"] is None and min(chain["draft_ms"], chain["verify_ms"]) > 0
        assert chain["gb_per_step"] > plain["gb_per_step"]
        assert plain["floor_fraction"] == plain["floor_ms"] / plain["ms_per_step"]
    assert document.keys() >= {"device", "torch", "dtype", "model", "speculator", "ceiling_gb_s"}
    assert document["random_weights"] and document["ceiling_gb_s"] == 1
    lines = out.splitlines()
    assert "reads 1 GB/s, does 1.00 TFLOP/s in float32" in lines[0] and "RANDOM WEIGHTS" in out
    title = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    assert [line.split()[0] for line in lines[title + 1 : title + 9]] == ["plain", "chain"] * 4
    drafted, cells = lines[title + 2].split(), lines[title].split()
    shown = dict(zip(cells, drafted[:4] + drafted[5:], strict=False))  # "5 tokens" is one cell
    parts = [float(shown[part]) for part in ("draft", "verify", "rest")]
    assert sum(parts) == pytest.approx(float(shown["ms/step"]), abs=0.0021)  # three digits each


def test_trees_beside_the_chain(main, tmp_path):
    pytest.importorskip("matplotlib")
    argv = ("--shape", "tiny", "--prompt-len", 5, "--tree", "3,9,64", "--plot", tmp_path / "a.png")
    out, _, rows = main(*argv)
    modes = [(row["mode"], row["nodes"]) for row in rows]
    # 41 is all that heads with 4, 3 and 2 children can give.
    assert modes == [("plain", 1), ("chain", 4), ("tree", 3), ("tree", 9), ("tree", 41)]
    for row in rows[2:]:
        assert min(row["draft_ms"], row["verify_ms"]) > 0 and row["tokens_per_step"] is None
    gb = [row["gb_per_step"] for row in rows]
    assert gb[0] < gb[2] < gb[1] == pytest.approx(gb[3]) == pytest.approx(gb[4])
    assert sum(line.startswith("tree ") for line in out.splitlines()) == 3
    _, _, rows = main(*argv[:4], "--tree", 64, "--top-k-tokens-per-head", "2,1,3")
    assert rows[-1]["nodes"] == 1 + 2 + 2 + 6


def test_trees_of_right_drafts(main, dirs, tmp_path):
    """The story's 20 tokens and its end: a tree of 9 nodes holds the whole right chain of 3 drafts,
    a tree of 3 nodes two of them."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "Q"}\n{"prompt": [5, 6, 7]}\n')
    argv = ("--checkpoint", dirs.story, "--speculator", dirs.right, "--prompts", file)
    argv = (*argv, "--max-new-tokens", 64, "--tree", "9,3", "--top-k-tokens-per-head", "2,2,1")
    _, _, rows = main(*argv)
    assert [row["nodes"] for row in rows] == [1, 4, 9, 3]
    assert [row["tokens_per_step"] for row in rows] == [1, 3.5, 3.5, 3]


@pytest.mark.parametrize(("second", "shown"), [(0.75, 0.75), (0.5, "mixed")])
def test_temperatures_of_a_file(main, dirs, tmp_path, second, shown):
    file = tmp_path / "in.jsonl"
    rows = [{"prompt": "Q", "temperature": t} for t in (0.75, second)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("--checkpoint", dirs.story, "--speculator", dirs.right, "--prompts", file)
    out, _, rows = main(*argv, "--max-new-tokens", 32)
    assert [row["temperature"] for row in rows] == [shown, shown]
    assert f" {shown} " in next(line for line in out.splitlines() if line.startswith("chain"))


def test_live_cache_in_the_bytes(main):
    """16 tokens after 5: one row holds 5 + 8 on average, with 192 * 2 bytes per token in float32;
    the weights are counted before any packing."""
    _, _, rows = main("--shape", "tiny", "--prompt-len", "5", "--max-new-tokens", "16")
    layer = 48 * (80 + 48 + 128) + 64 * 48 + 2 * 48
    weights = 4 * (3 * layer + 48 + 97 * 48)
    assert rows[0]["gb_per_step"] == pytest.approx((weights + 13 * 384) / 1e9, rel=1e-5)


@pytest.mark.skipif(
    not packs_linears(torch.device("cpu"), torch.float32, False),
    reason="nothing is packed",
)
def test_packed_drafts_are_counted():
    speculator = MLPSpeculator(SpeculatorArgs(64, 96, 2, 130, tie_weights=True))
    before = [bench.head_weights(speculator, i) for i in (0, 1)]
    pack_linears(speculator, exact=False)
    after = [bench.head_weights(speculator, i) for i in (0, 1)]
    for old, new, matrix in zip(before, after, (96 * (64 + 130), 96 * (96 + 130)), strict=True):
        assert old.numbers <= new.numbers and matrix <= new.nbytes < old.nbytes  # a byte each


def test_projected_column_and_no_split(main):
    argv = ("--shape", "tiny", "--prompt-len", "5", "--assume-tokens-per-step", "2.5", "--no-split")
    out, _, (plain, chain) = main(*argv)
    assert chain["draft_ms"] is chain["verify_ms"] is None
    expected = 2.5 * plain["ms_per_step"] / chain["ms_per_step"]
    assert chain["projected_speedup"] == pytest.approx(expected, rel=1e-4)
    line = next(line for line in out.splitlines() if line.startswith("chain"))
    assert "projected" in out and line.endswith(f" {chain['projected_speedup']:.2f}")


@pytest.mark.parametrize("sampled", [(), ("--temperature", 1, "--top-p", 0.9)])
def test_prompts_of_a_file_with_drafts_that_are_right(main, dirs, tmp_path, sampled):
    """The story's 20 tokens and its end in 6 steps of 4 and fewer, at T = 1 nearly always, too."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "Q"}\n{"prompt": [5, 6, 7]}\n')
    argv = ("--checkpoint", dirs.story, "--speculator", dirs.right, "--prompts", file)
    _, document, (plain, chain) = main(*argv, "--batch", 3, "--max-new-tokens", 64, *sampled)
    assert plain["tokens_per_step"] == 1 and chain["prompts"] == "in.jsonl"
    if not sampled:
        assert chain["tokens_per_step"] == 3.5  # 21 tokens in 6 steps
    assert chain["speedup"] == pytest.approx(chain["tokens_per_s"] / plain["tokens_per_s"], 1e-4)
    assert chain["temperature"] == (1 if sampled else 0)
    assert not document["random_weights"] and document["speculator"] == str(dirs.right)


def test_prompt_len_of_a_checkpoint_is_text_and_ignores_ends(main, dirs):
    argv = ("--checkpoint", dirs.story, "--speculator", dirs.right, "--prompt-len", 20)
    _, _, (_, chain) = main(*argv, "--num-draft-tokens", 2)
    assert chain["nodes"] == 3 and chain["prompts"] == "20 tokens"
    llm = bench.LLM(dirs.story, max_seq_len=100, device="cpu", load=False)
    one, two = bench.made_requests(llm, 20, 2, bench.SamplingParams(ignore_eos=True))
    readme = (bench.Path(bench.__file__).parent / "README.md").read_text("utf-8")
    assert readme.startswith(llm.tokenizer.decode(one.prompt)) and one.prompt != two.prompt
    assert one.stop_ids == []


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_vs_transformers_on_the_same_weights(main, name, monkeypatch, tmp_path):
    """Equal ids, greedy: the weights are ours."""
    base = bench.GRANITE if name == "tied" else bench.LLAMA
    monkeypatch.setitem(bench.SHAPES, "tiny", (TINY[0], base, *TINY[2:]))
    seen = {}

    def noting(name):
        inner = getattr(bench, name)

        def run(*args):
            seen.setdefault(name, []).append(inner(*args))
            return seen[name][-1]

        monkeypatch.setattr(bench, name, run)

    noting("transformers_model")
    noting("random_weights")
    _, _, rows = main("--shape", "tiny", "--prompt-len", "5", "--batch", 2, "--vs", "transformers")
    assert [row["mode"] for row in rows] == ["plain", "chain", "transformers"]
    assert rows[2]["tokens_per_step"] == 1 and rows[2]["speedup"] > 0
    theirs, ours = seen["transformers_model"][0], seen["random_weights"][0]
    ids = torch.tensor([[5, 7, 11, 13]])
    positions, root = torch.arange(4)[None], torch.zeros(1, dtype=torch.long)
    kv = torch.zeros(bench_kv_shape(ours))
    with torch.inference_mode():
        hidden, _ = ours(ids, positions, kv, root, torch.ones(4, 4, dtype=torch.bool).tril())
        # float32 sums of 64 terms or fewer in another order.
        torch.testing.assert_close(ours.logits(hidden), theirs(ids).logits, atol=1e-5, rtol=1e-4)


def bench_kv_shape(model):
    args = model.args
    return (args.n_layers, 2, 1, args.n_kv_heads, 0, args.head_dim)


def test_transformers_on_ragged_prompts_that_end(dirs, tmp_path, main):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "Q"}\n{"prompt": " one two three"}\n')
    argv = ("--checkpoint", dirs.story, "--prompts", file, "--batch", 2, "--vs", "transformers")
    _, _, (plain, theirs) = main(*argv)
    assert plain["mode"] == "plain" and theirs["mode"] == "transformers"
    assert theirs["tokens_per_step"] == 1


def test_files_and_plot(main, tmp_path):
    pytest.importorskip("matplotlib")
    png, file = tmp_path / "a.png", tmp_path / "a.json"
    argv = ("--shape", "tiny", "--prompt-len", "5", "--batch", "1,2")
    _, document, _ = main(*argv, "--plot", png, "--json", file)
    assert json.loads(file.read_text()) == document
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bundled", [False, True])
def test_without_arguments_the_demo_model(main, dirs, monkeypatch, tmp_path, bundled):
    monkeypatch.setattr(bench.fastspec, "demo_checkpoint", lambda: dirs.story)
    if bundled:
        monkeypatch.setattr(bench.fastspec, "BUNDLED", shutil.copytree(dirs.right, tmp_path / "s"))
        demo = {"base_model_name_or_path": bench.fastspec.DEMO}
        edit_json(tmp_path / "s" / "config.json", lambda config: config.update(demo))
    _, document, rows = main("--prompt-len", 20)
    assert [row["mode"] for row in rows] == ["plain", "chain"][: 1 + bundled]
    speculator = str(tmp_path / "s") if bundled else None
    assert (document["model"], document["speculator"]) == ("story", speculator)


@pytest.mark.parametrize("values", ["0", "4,x", ""])
def test_what_is_no_list_of_numbers(capsys, values):
    with pytest.raises(SystemExit):
        bench.main(["--shape", "tiny", "--tree", values])
    assert f"--tree: {values!r} is no list of " in capsys.readouterr().err


def test_parts_longer_than_the_step_leave_no_rest():
    """As on a CPU, whose steps leave out unlikely drafts."""
    row = make_row(12.5, 50, 20, 4) | {"batch": 1, "prompts": "x", "temperature": 0}
    bench.compare([row], random=False, assumed=None)
    shown = [
        bench.table_line(bench.COLUMNS, row | {"draft_ms": 2.0, "verify_ms": ms}).split()[8]
        for ms in (10.0, 11.0)
    ]
    assert shown == ["0.500", "-"]


ERRORS = {
    "shape": (("--shape", "gpt-5"), r"'gpt-5' is not known; known: llama2-13b, .*, granite-20b"),
    "shape_and_checkpoint": (("--shape", "tiny", "--checkpoint", "x"), "goes without --checkpoint"),
    "both_prompts": (("--prompts", "x", "--prompt-len", "5"), "goes without --prompt-len"),
    "k_alone": (("--num-draft-tokens", "2"), "needs --speculator"),
    "one_alone": (("--num-draft-tokens", "1"), "--num-draft-tokens needs --speculator or --shape"),
    "tree_alone": (("--tree", "8"), "--tree needs --speculator or --shape"),
    "int8_alone": (("--draft-dtype", "int8"), "--draft-dtype needs --speculator or --shape"),
    "children_alone": (("--shape", "tiny", "--top-k-tokens-per-head", "2,2,2"), "needs --tree"),
    "children": (
        ("--shape", "tiny", "--tree", "8", "--top-k-tokens-per-head", "2"),
        "top_k_tokens_per_head must be 3 integers",
    ),
    "tree_too_large": (("--shape", "tiny", "--tree", "8,999"), "2 to 64 nodes, found 999"),
    "draft_ranks": (("--shape", "tiny", "--draft-tensor-parallel-size", "2"), "supported are 1"),
    "k_too_large": (("--shape", "tiny", "--num-draft-tokens", "9"), "has 3 heads"),
    "short": (("--shape", "tiny", "--max-new-tokens", "3"), "3: at least 16"),
    "context": (("--shape", "tiny", "--prompt-len", "500"), "exceeds the model's context of 512"),
    "assumed": (("--shape", "tiny", "--assume-tokens-per-step", "9"), "gives 1 to 4 tokens"),
    "top_p": (("--shape", "tiny", "--top-p", "2"), "top_p 2.0 is out of range"),
    "memory": (("--shape", "llama3-70b", "--batch", "9999"), r"GB do not fit into .* GB"),
    "json": (("--shape", "tiny", "--json", "/nowhere/x"), "/nowhere/x"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, error):
    argv, message = ERRORS[case]
    assert re.search(message, error(*argv))


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("", "no row to run"),
        ('{"prompt": "a"}\n{"prompt": ', r"in.jsonl:2: not JSON"),
        ('\n{"prompt": "a", "x": 1}', r"in.jsonl:2: 'x' is not supported"),
    ],
)
def test_bad_prompt_files(text, message, error, dirs, tmp_path):
    file = tmp_path / "in.jsonl"
    if text is not None:
        file.write_text(text)
    assert re.search(message, error("--checkpoint", dirs.story, "--prompts", file))


@pytest.mark.parametrize(
    "option, package", [("--vs=transformers", "transformers"), ("--plot=x.png", "matplotlib")]
)
def test_a_package_that_is_missing_is_named(option, package, error, monkeypatch):
    find = bench.importlib.util.find_spec

    def missing(name):
        return None if name == package else find(name)

    monkeypatch.setattr(bench.importlib.util, "find_spec", missing)
    assert f"needs {package}: pip install {package}" in error("--shape", "tiny", option)


@pytest.mark.parametrize("value", ["0", "1,x", ""])
def test_counts_that_are_none(value, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--batch", value])
    assert "--batch" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(capsys, monkeypatch):
    monkeypatch.setitem(
        bench.SHAPES, "tiny", ((256, 2, 4, 2, 512, 1000, 512), bench.LLAMA, 128, [4, 3, 2], {})
    )
    assert bench.main(["--shape", "tiny", "--batch", "1,2", "--split", "--tree", "9"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == 6 and all(0 < row["peak_gb"] < 8 for row in rows)
    for row in (*rows[1:3], *rows[4:]):
        assert min(row["draft_ms"], row["verify_ms"]) > 0
    assert all(row["launches_per_step"] == {"cudaGraphLaunch": 1} for row in rows)


# ---- several ranks ----

RANK = """
import sys, bench
bench.SHAPES["tiny"] = ((48, 1, 8, 2, 64, 96, 512), bench.LLAMA, 32, [4, 3, 2], {})
bench.measure_ceiling = lambda *_: bench.Work(1e9, 1e12)
sys.exit(bench.main(sys.argv[1:]))
"""


def test_ranks_share_a_shape(tmp_path):
    """Two gloo processes, of which the first alone prints; the modes alternate on both."""
    script, root = tmp_path / "rank.py", Path(bench.__file__).parent
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    command += ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--prompt-len", "5"]
    command += ["--max-new-tokens", "16", "--batch", "1,2", "--tree", "9"]
    command += ["--draft-tensor-parallel-size", "2", "--rounds", "1"]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    document = json.loads(lines[-1])
    assert lines[0].startswith("2 x CPU") and sum(line.startswith("mode ") for line in lines) == 1
    assert (document["ceiling_gb_s"], document["ceiling_tflop_s"]) == pytest.approx((2, 2))
    modes = [(row["mode"], row["batch"]) for row in document["rows"]]
    assert modes == [(mode, batch) for batch in (1, 2) for mode in ("plain", "chain", "tree")]
    # Both ranks have the norms, all else is shared; a row holds 5 + 8 tokens on average, each with
    # keys and values of two heads of 6 in float32.
    layer = 48 * (48 + 2 * 12 + 48 + 128) + 64 * 48 + 2 * 2 * 48
    weights = layer + 2 * 48 + 96 * 48
    expected = 4 * (weights + 13 * 2 * 2 * 6) / 1e9
    assert document["rows"][0]["gb_per_step"] == pytest.approx(expected, rel=1e-5)
    assert all(row["draft_ms"] > 0 for row in document["rows"] if row["nodes"] > 1)
