"""Latency of decode steps, plain and with an MLP speculator, beside what the device could do.

    python bench.py                                        the demo model
    python bench.py --shape llama3-8b --batch 1,4,16       a published pair with random weights
    python bench.py --shape llama3-8b --tree 8,16,32       trees of candidates beside a chain
    python bench.py --speculator DIR --prompts FILE.jsonl  real acceptance on real prompts
    torchrun --nproc-per-node 4 bench.py ...               GPUs that share the target

The ceiling comes first: the bandwidth at which the device reads and the rate at which it
multiplies, both measured; of several devices the sum. A step's floor is the bytes it must read, or
the products it must do, at these rates. Modes of one case alternate in rounds; a first one, of
two batches at most, is warm-up and not counted. A step's time is the median over the rounds of the
median between two results that reach the host. The last line of stdout is one JSON document.

Reads downward: shapes, ceiling, what a step needs, engines, runs, rows, output, the command line.
"""

import argparse
import importlib.util
import json
import math
import re
import resource
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from torch import Tensor

import fastspec
from fastspec import LLM, Engine, Request, SamplingParams, step_needs
from model import Transformer, hf_tensors, rope_frequencies
from speculator import MLPSpeculator, tree_widths

# --- shapes: the published pairs, by the fields of their config.json ----------------------------

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = (*SIZES, "intermediate_size", "vocab_size", "max_position_embeddings")
BIGCODE_SIZES = ("n_embd", "n_layer", "n_head", "", "n_inner", "vocab_size", "n_positions")
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA3 = LLAMA | {"rope_theta": 5e5}
CODELLAMA = LLAMA | {"rope_theta": 1e6}
GRANITE = LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
BIGCODE = {"model_type": "gpt_bigcode", "multi_query": True}
TIED = {"tie_weights": True}
SCALED = TIED | {"scale_input": True}
WIDE = [4, 3, 2, 2]
WIDER = [4, 3, 2, 2, 2]

# hidden, layers, heads, KV heads, feed-forward, vocabulary, context, and more of the target;
# inner_dim, children of a node in a tree by depth (some publish none), and more of the speculator
SHAPES = {
    "llama2-13b": ((5120, 40, 40, 40, 13824, 32000, 4096), LLAMA, 4096, [5, 3, 2], {}),
    "llama2-70b": ((8192, 80, 64, 8, 28672, 32000, 4096), LLAMA, 8192, WIDE, SCALED),
    "llama3-8b": ((4096, 32, 32, 8, 14336, 128256, 8192), LLAMA3, 3072, WIDE, {}),
    "llama3-70b": ((8192, 80, 64, 8, 28672, 128256, 8192), LLAMA3, 8192, WIDE, SCALED),
    "codellama-34b": ((8192, 48, 64, 8, 22016, 32000, 16384), CODELLAMA, 8192, WIDER, SCALED),
    "granite-3b": ((2560, 32, 32, 32, 10240, 49152, 2048), GRANITE, 4096, WIDER, TIED),
    "granite-7b": ((4096, 32, 32, 32, 11008, 32008, 4096), LLAMA, 4096, WIDER, {}),
    "granite-8b": ((4096, 36, 32, 8, 14336, 49152, 4096), GRANITE, 4096, WIDER, {}),
    "granite-20b": ((6144, 52, 48, 1, 24576, 49152, 8192), BIGCODE, 4096, WIDE, {}),
}


def shape_configs(name: str) -> dict[str, dict]:
    """config.json of target and speculator."""
    if name not in SHAPES:
        raise ValueError(f"--shape {name!r} is not known; known: {', '.join(SHAPES)}")
    sizes, target, inner_dim, children, speculator = SHAPES[name]
    names = BIGCODE_SIZES if target is BIGCODE else SIZES
    widths = {"emb_dim": sizes[0], "inner_dim": inner_dim, "vocab_size": sizes[5]}
    heads = {"n_predict": len(children), "top_k_tokens_per_head": children}
    draft = {"model_type": "mlp_speculator"} | widths | heads | speculator
    return {"target": target | dict(zip(names, sizes, strict=True)), "speculator": draft}


def random_weights(kind: type, args, llm: LLM, part: Callable | None = None) -> nn.Module:
    """A module whose norms change nothing and whose other weights are normal; with `part`, what a
    rank holds of it."""
    with torch.device("meta"):
        module = kind(args).to(llm.dtype).requires_grad_(False)
    for name, param in module.named_parameters() if part else ():
        param.data = part(name, param.data).contiguous()
    module.to_empty(device=llm.device)
    if isinstance(module, Transformer):
        module.inv_freq = rope_frequencies(args).to(llm.device)
        if args.tie_embeddings:
            module.output.weight = module.embed.weight
    generator = torch.Generator(llm.device).manual_seed(0)
    for name, param in module.named_parameters():
        if param.dim() > 1:
            param.normal_(0, 0.02, generator=generator)
        else:
            param.fill_(float(name.endswith("weight")))
    return module.eval()


# --- the ceiling -------------------------------------------------------------------------------


class Work(NamedTuple):
    """What is read and multiplied: by a step, or in a second."""

    nbytes: float
    flops: float


def best_seconds(work: Callable, device: torch.device, repeats: int) -> float:
    """Seconds of one call: best of five series, queued without a wait in between."""

    def series() -> None:
        for _ in range(repeats):
            work()
        synchronize(device)

    series()
    return min(timeit.repeat(series, number=1, repeat=5)) / repeats


def synchronize(device: torch.device) -> None:
    getattr(torch, device.type).synchronize()


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Work:
    """Of a second: a sum over far more than the device's caches hold, and a large product."""
    size, width, repeats = 2**28, 1024, 2
    if device.type == "cuda":
        size, width, repeats = min(2**32, torch.cuda.mem_get_info(device)[0] // 2), 8192, 20
    buffer = torch.ones(size // 4, device=device)
    read = size / best_seconds(buffer.sum, device, repeats)
    square = torch.ones(width, width, device=device, dtype=dtype)
    product = 2 * width**3 / best_seconds(partial(torch.mm, square, square), device, repeats)
    return Work(read, product)


# --- what a step needs -------------------------------------------------------------------------


class Weights(NamedTuple):
    """Weights that a forward reads: how many, and their bytes as they are stored."""

    numbers: int
    nbytes: int


def count_weights(*modules: nn.Module) -> Weights:
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    found = [(t.numel(), t.nbytes) for t in tensors]
    kinds = fastspec.PackedLinear, fastspec.HalfLinear, fastspec.ByteLinear
    found += [m.size for top in modules for m in top.modules() if isinstance(m, kinds)]
    return Weights(*map(sum, zip(*found, strict=True)))


def target_weights(model: Transformer) -> Weights:
    """Without embedding tables, of which a step reads a few rows; a tied one is the output layer's
    weight."""
    return count_weights(model.layers, model.norm, model.output)


def head_weights(speculator: MLPSpeculator, i: int) -> Weights:
    """Of head i, without the embedding table. Tied heads are read once for each token."""
    shared = 0 if speculator.args.tie_weights else i
    proj = speculator.proj[min(i, len(speculator.proj) - 1)]
    return count_weights(proj, speculator.ln[shared], speculator.head[shared])


def draft_rows(engine: Engine) -> list[int]:
    """Nodes of one sequence from which each head drafts: in a tree, all that are kept at its depth.
    However many they are, the head is read once."""
    top_k = engine.top_k_tokens_per_head if engine.tree else (1,) * engine.k
    return tree_widths(top_k, nodes_of(engine))[1][: engine.k]


def step_need(target: Weights, heads: list[Weights], engine: Engine, live: float) -> Work:
    """A step of all rows, with `live` tokens cached in each. Of several ranks each does as much
    as this one, whose parts are counted."""
    B, N, args, heads = engine.batch_size, nodes_of(engine), engine.model.args, heads[: engine.k]
    token_bytes = engine.kv[:, :, 0, :, 0].nbytes  # keys and values of one token in all layers
    read = target.nbytes + sum(head.nbytes for head in heads) + B * live * token_bytes
    drafts = sum(head.numbers * n for head, n in zip(heads, draft_rows(engine), strict=True))
    attention = 4 * B * N * live * args.n_layers * args.n_heads * args.head_dim
    ranks = 1 if engine.ranks is None else engine.ranks.size
    return Work(ranks * read, ranks * (2 * B * (target.numbers * N + drafts) + attention))


def nodes_of(engine: Engine) -> int:
    """Candidates per row and step."""
    return engine.tree or engine.k + 1


def floor_ms(need: Work, ceiling: Work) -> float:
    return 1000 * max(need.nbytes / ceiling.nbytes, need.flops / ceiling.flops)


# --- engines -----------------------------------------------------------------------------------


class BenchEngine(Engine):
    """Notes when each step's result is there, and runs parts of a step by themselves."""

    led = (*Engine.led, "use", "ceiling", "time_parts")
    llm: "Case"
    clock: list[float]

    def wait(self, packet) -> list[list[int]]:
        columns = super().wait(packet)
        self.clock.append(time.perf_counter())
        return columns

    def use(self, mode: int) -> None:
        """From now on the engine of this mode runs."""
        self.llm.engine = self.llm.engines[mode]
        self.llm.k = self.llm.engine.k

    def ceiling(self) -> Work:
        """Of all ranks, measured at once."""
        found = torch.tensor(measure_ceiling(self.kv.device, self.kv.dtype)).to(self.kv.device)
        torch.cuda.empty_cache()
        return Work(*(found if self.ranks is None else self.ranks.sum(found)).tolist())

    @torch.inference_mode()
    def time_parts(self, live: int, noisy: bool, filtered: int) -> list[float]:
        """Milliseconds of draft and of verify, each compiled by itself, with `live` tokens in every
        row's cache."""
        self.length.fill_(live)
        self.all_drafts = True
        slots, times = None if self.compiled else live - 1, []
        root = self.length - 1
        tokens, _, *tree = self.candidates(root, noisy)
        verify = tokens, root, *tree, slots, noisy, filtered
        for part, args in ((self.candidates, (root, noisy)), (self.verify, verify)):
            if self.compiled:
                part = torch.compile(part, mode="reduce-overhead", fullgraph=True, dynamic=False)
            for _ in range(3 if self.compiled else 1):  # compile, capture, replay
                part(*args)
            repeats = 20 if self.compiled else 2
            times.append(1000 * best_seconds(partial(part, *args), self.kv.device, repeats))
        self.all_drafts = False
        return times

    def trace_steps(self, noisy: bool, filtered: int) -> dict:
        """What one step launches, and milliseconds in kernels that communicate."""
        with torch.profiler.profile() as trace:
            for _ in range(5):
                self.wait(self.step(noisy, filtered))
        events = trace.key_averages()
        names = "nccl|all_reduce|_add_parts"
        sums = [e.self_device_time_total for e in events if re.search(names, e.key)]
        launches = {e.key: e.count / 5 for e in events if "Launch" in e.key}
        return {"comm_ms": sum(sums) / 5000, "launches_per_step": launches}


class Case(LLM):
    """An LLM of one batch size with an engine for each mode, all over the same weights."""

    engine_class = BenchEngine

    def __init__(self, options: argparse.Namespace, *args, **kwargs):
        if torch.cuda.is_available():
            torch._dynamo.reset()  # frees the graphs of the case before
        super().__init__(*args, **kwargs)
        self.options, self.modes = options, [(0, 0, ())]  # k, nodes of a tree, children in it
        if self.k:
            self.modes.append((self.k, 0, ()))
            children = options.top_k_tokens_per_head
            asked = [{"tree": n, "top_k_tokens_per_head": children} for n in options.tree]
            for tree in asked or [{}]:  # the usual one
                found = fastspec.read_tree(tree, self.speculator_args, self.k, self.usual_tree)
                if nodes := found[0]:
                    self.modes.append((min(self.k, nodes - 1), *found))

    def load(self, ranks=None) -> None:
        super().load(ranks)  # which leads the last engine
        for engine in self.engines[:-1] if ranks else ():
            ranks.lead(engine)

    def load_weights(self, ranks=None) -> None:
        super().load_weights(ranks)
        target, speculator = self.engine.model, self.engine.speculator
        self.weights = target_weights(target)
        self.heads = [head_weights(speculator, i) for i in range(max(k for k, *_ in self.modes))]

    def read_weights(self, ranks):
        start = time.perf_counter()
        if self.options.shape:
            target = random_weights(Transformer, self.local_args, self)
            part, args = ranks and ranks.parts(self)[1].get("part"), self.speculator_args
            speculator = random_weights(MLPSpeculator, args, self, part) if self.k else None
        else:
            target, speculator = super().read_weights(ranks)
        synchronize(self.device)
        self.load_seconds = time.perf_counter() - start
        return target, speculator

    def new_engine(self, target, speculator, ranks) -> Engine:
        self.engines = []
        for mode in self.modes:
            self.k, self.tree, self.top_k_tokens_per_head = mode
            self.engines.append(super().new_engine(target, speculator, ranks))
            self.engines[-1].llm, self.engines[-1].clock = self, []
        self.rival = transformers_model(self, hf_tensors(target)) if self.options.vs else None
        return self.engines[-1]


# --- runs --------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One pass over the prompts: medians, what all rows emitted in how many steps, tokens in a
    row's cache in the mean of the steps, and seconds with prefill."""

    step_ms: float
    ttft_ms: float
    tokens: int
    steps: int
    live: float
    seconds: float
    peak_gb: float


def run_summary(clock: list[float], first: list[float], answers: list, seconds: float) -> Run:
    """From the times of results, seconds to first tokens and (prompt, answer, steps) lengths."""
    gaps = [after - before for before, after in pairwise(clock)]
    if len(gaps) < 2:  # as a warm-up may be
        gaps = [math.nan]
    _, tokens, steps = map(sum, zip(*answers, strict=True))
    live = sum((prompt + answer / 2) * n for prompt, answer, n in answers) / steps
    return Run(1e3 * median(gaps), 1e3 * median(first), tokens, steps, live, seconds, peak_gb())


def peak_gb() -> float:
    """On a GPU since the last reset; else the whole process's so far."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run_engine(llm: Case, mode: int, requests: list[Request]) -> Run:
    """Through the whole of `LLM`: host loop, ends and text as in use."""
    llm.engine.use(mode)
    llm.engine.clock, start = [], time.perf_counter()
    outputs = [output for *_, output in llm.run(requests) if output is not None]
    seconds = time.perf_counter() - start
    answers = [(len(o.prompt_token_ids), len(o.outputs[0].token_ids), o.steps) for o in outputs]
    return run_summary(llm.engine.clock, [o.time_to_first_token for o in outputs], answers, seconds)


def transformers_model(llm: LLM, tensors: dict[str, Tensor]):
    """transformers' model over the same weights, by their Hugging Face names."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(llm.directory)
    build = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained
    model = build(None, config=config, state_dict=tensors, dtype=llm.dtype).to(llm.device).eval()
    model.load_state_dict(tensors, strict=False, assign=True)  # in place of copies through the host
    model.tie_weights()
    return model


@torch.inference_mode()
def run_transformers(llm: Case, requests: list[Request]) -> Run:
    """`generate` on groups of `batch_size` prompts, padded on the left. On a GPU with its static
    cache, which it compiles; every group has the settings of its first row."""
    from transformers import GenerationConfig

    clock, first, answers, begin = [], [], [], time.perf_counter()

    def tick(ids, scores, **_):
        synchronize(llm.device)
        clock.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    for at in range(0, len(requests), llm.batch_size):
        group = requests[at : at + llm.batch_size]
        params, ends = group[0].params, group[0].stop_ids
        rows = [torch.tensor(request.prompt) for request in group]
        ids, mask = (
            nn.utils.rnn.pad_sequence(x, True, padding_side="left").to(llm.device)
            for x in (rows, [torch.ones_like(row) for row in rows])
        )
        options = {"do_sample": params.temperature > 0, "max_new_tokens": params.max_tokens}
        for name in ("temperature", "top_p", "top_k") if params.temperature > 0 else ():
            options[name] = getattr(params, name)
        cache = "static" if llm.compiled else None
        llm.rival.generation_config = GenerationConfig(
            eos_token_id=ends or None, pad_token_id=0, cache_implementation=cache, **options
        )
        start, ticks = time.perf_counter(), len(clock)
        out = llm.rival.generate(ids, attention_mask=mask, stopping_criteria=[tick])
        first += [clock[ticks] - start] * len(group)
        for request, row in zip(group, out[:, ids.shape[1] :].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            answers.append((len(request.prompt), length, length))
    return run_summary(clock, first, answers, time.perf_counter() - begin)


# --- rows --------------------------------------------------------------------------------------


def new_row(mode: str, nodes: int, runs: list[Run], need: Work, ceiling: Work) -> dict:
    """Times, counts and shares of one mode; what compares it with others comes later."""
    step_ms, floor = median(run.step_ms for run in runs), floor_ms(need, ceiling)
    if math.isnan(step_ms):
        raise ValueError("the answers end within two steps, too short to time; use other prompts")
    _, _, tokens, steps, _, seconds, _ = map(sum, zip(*runs, strict=True))
    return {
        "mode": mode,
        "nodes": nodes,
        "ms_per_step": step_ms,
        "draft_ms": None,
        "verify_ms": None,
        "tokens_per_step": tokens / steps,
        "tokens_per_s": 1000 * tokens / steps / step_ms,  # of one sequence, while it decodes
        "total_tokens_per_s": tokens / seconds,
        "floor_ms": floor,
        "floor_fraction": floor / step_ms,
        "gb_per_step": need.nbytes / 1e9,
        "ttft_ms": median(run.ttft_ms for run in runs),
        "peak_gb": max(run.peak_gb for run in runs),
    }


NOT_REAL = ("tokens_per_step", "tokens_per_s", "total_tokens_per_s")  # of random drafts


def compare(rows: list[dict], random: bool, assumed: float | None) -> None:
    """Speed-up of each row over the first, plain one. Random drafts have none, but a projected
    one, for an assumed number of tokens per step."""
    plain = rows[0]["tokens_per_s"]
    for row in rows:
        drafts = row["nodes"] > 1
        row |= dict.fromkeys(NOT_REAL) if drafts and random else {}
        row["speedup"] = row["tokens_per_s"] and row["tokens_per_s"] / plain
        if assumed is not None:
            rate = 1000 * assumed / row["ms_per_step"]
            row["projected_speedup"] = rate / plain if drafts else None


def measure_rows(llm: Case, requests: list[Request], ceiling: Work, bar) -> list[dict]:
    """Rows of one batch size and set of prompts, plain decoding first."""
    options, rows, needs = llm.options, [], step_needs(r.params for r in requests)
    runners = [partial(run_engine, llm, mode) for mode in range(len(llm.engines))]
    runners += [partial(run_transformers, llm)] if llm.rival else []
    runs: list[list[Run]] = [[] for _ in runners]
    few = requests[: 2 * llm.engine.batch_size]
    for given in (few, *[requests] * options.rounds):
        for runner, of_mode in zip(runners, runs, strict=True):
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            of_mode.append(runner(given))
            bar.update()
    names = ["tree" if e.tree else "chain" if e.k else "plain" for e in llm.engines]
    engines = [*llm.engines, llm.engines[0]]  # transformers needs what plain decoding does
    for i, (_, *of_mode) in enumerate(runs):
        engine, live = engines[i], mean(run.live for run in of_mode)
        need = step_need(llm.weights, llm.heads, engine, live)
        name = [*names, "transformers"][i]
        rows.append(new_row(name, nodes_of(engine), of_mode, need, ceiling))
        if engine.k and (not llm.compiled if options.split is None else options.split):
            llm.engine.use(i)
            rows[-1]["draft_ms"], rows[-1]["verify_ms"] = engine.time_parts(int(live), *needs)
        if options.split and llm.compiled and i < len(llm.engines):
            llm.engine.use(i)
            rows[-1] |= engine.trace_steps(*needs)
    compare(rows, options.shape is not None, options.assume_tokens_per_step)
    return rows


# --- output ------------------------------------------------------------------------------------

# Title, which sets the width, and what a row shows below it: key and format; none for text.
COLUMNS = [
    *(("mode        ", "mode", ""), ("nodes", "nodes", "d"), ("batch", "batch", "d")),
    *(("prompts       ", "prompts", ""), ("    T", "temperature", "g")),
    *((" ms/step", "ms_per_step", ".3f"), ("  draft", "draft_ms", ".3f")),
    *((" verify", "verify_ms", ".3f"), ("   rest", "rest_ms", ".3f")),
    *(("tok/step", "tokens_per_step", ".2f"), (" tok/s", "tokens_per_s", ".1f")),
    *((" total", "total_tokens_per_s", ".1f"), ("speed-up", "speedup", ".2f")),
    *(("  floor", "floor_ms", ".3f"), ("share", "floor_fraction", ".0%")),
    *(("   ttft", "ttft_ms", ".1f"), ("peak GB", "peak_gb", ".1f")),
]
PROJECTED = ("projected", "projected_speedup", ".2f")
CEILING = """\
{device}, measured: reads {ceiling_gb_s:.0f} GB/s, does {ceiling_tflop_s:.2f} TFLOP/s in {dtype}
model {model}, speculator {speculator}, torch {torch}"""
LEGEND = """\
ms/step = draft + verify + rest (alone, where timed); tok/s of one sequence while it decodes, total
of all with their prefill; floor in ms, share = floor / step (a CPU verifies what is likely;
draft, verify and floor count all); ttft in ms; peak GB of the first device, with the caches of all
modes in memory. Tokens per step depend on the text: --prompts FILE has yours.
load {load_s:.1f} s, compile and capture {compile_s:.1f} s ({compiled_graphs} graphs not in a cache)
"""


def table_line(columns: list, row: dict | None = None) -> str:
    """A row, or the titles. `rest` is choosing what to accept, committing it, the host's part."""
    if row is not None:
        parts = row["draft_ms"], row["verify_ms"]
        # Parts that took longer than the step were not all of it: a CPU drafts less.
        timed = None not in parts and sum(parts) <= row["ms_per_step"]
        row = row | {"rest_ms": row["ms_per_step"] - sum(parts) if timed else None}
    cells = []
    for title, key, form in columns:
        value = title if row is None else row[key]
        text = value if isinstance(value, str) else "-" if value is None else format(value, form)
        cells.append(f"{text[: len(title)]:{'>' if form else '<'}{len(title)}}")
    return "  ".join(cells).rstrip()


def describe(llm: Case, ceiling: Work) -> dict:
    """Print what is measured and on what; the document without rows."""
    shape, options, ranks = llm.options.shape, llm.options, llm.tensor_parallel_size
    device = f"CPU, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"
    if llm.device.type == "cuda":
        device = torch.cuda.get_device_name(llm.device)
    document = {
        "device": f"{ranks} x {device}" if ranks > 1 else device,
        "torch": torch.__version__,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "model": shape or llm.directory.name,
        "speculator": shape or options.speculator,
        "random_weights": shape is not None,
        "ceiling_gb_s": ceiling.nbytes / 1e9,
        "ceiling_tflop_s": ceiling.flops / 1e12,
        "load_s": llm.load_seconds,
        "compile_s": 0.0,
        "compiled_graphs": 0,
        "options": vars(options),
    }
    print(CEILING.format(**document | {"speculator": document["speculator"] or "none"}))
    if shape:
        print("RANDOM WEIGHTS: time per step is real; acceptance and text are not")
    for engine, what in zip(llm.engines, ("plain decoding", "with drafts"), strict=False):
        nbytes = step_need(llm.weights, llm.heads, engine, 0).nbytes
        least = 1000 * nbytes / ceiling.nbytes
        print(f"weights of a step, {what}: {nbytes / 1e9:.3f} GB, at least {least:.3f} ms")
    print(f"{options.rounds} rounds after a short one of warm-up, modes alternating; medians\n")
    return document


def draw(rows: list[dict], file: str) -> None:
    """Milliseconds per step and speed-up against batch: a line per mode, nodes and prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault("{mode}, {nodes} nodes, {prompts}".format(**row), []).append(row)
    speed = "projected_speedup" if "projected_speedup" in rows[0] else "speedup"
    for axes, key in zip(figure.subplots(1, 2), ("ms_per_step", speed), strict=True):
        for label, line in lines.items():
            if points := [(row["batch"], row[key]) for row in line if row[key] is not None]:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xlabel="batch", xticks=sorted({row["batch"] for row in rows}), ylabel=key)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(file, format="png", dpi=150)


# --- command line ------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = "Time decode steps, plain and with an MLP speculator. Without arguments: the demo model"
    parser = argparse.ArgumentParser(prog="bench.py", description=about)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--checkpoint", help="target model: directory or hub id; unset: the speculator's, or demo")
    add("--speculator", help="directory or hub id; unset: the demo's, or none for a --checkpoint")
    add("--shape", metavar="NAME", help=f"random weights of a pair: {', '.join(SHAPES)}")
    add("--num-draft-tokens", type=int, help="tokens drafted per step; unset: all heads")
    tree = "trees of N nodes per step, too; unset: as fastspec.py"
    add("--tree", type=counts, default=[], metavar="N[,N..]", help=tree)
    add("--top-k-tokens-per-head", type=counts, metavar="4,3,..", help="children in a tree")
    add("--draft-dtype", choices=["auto", "int8"], help="int8: matrices in 8 bits (auto)")
    add("--draft-tensor-parallel-size", type=int, help="ranks that share the speculator (1)")
    add("--batch", type=counts, default=[1], help="rows decoded together, as 1,4,16 (1)")
    text = "tokens per prompt, of README.md's text, as 128,2048 (128)"
    add("--prompt-len", type=counts, help=text)
    add("--prompts", metavar="FILE", help="JSON lines with prompt or messages, and sampling fields")
    add("--rounds", type=int, default=3, help="of every mode, after a short one of warm-up (3)")
    add("--max-new-tokens", type=int, default=64, help="tokens per answer (64)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, help="1, the default, keeps all")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", help="unset: cuda if there is one, else cpu")
    add(
        "--split",
        action=flag,
        help="time draft and verify alone (unset: when eager); trace a compiled step",
    )
    add("--assume-tokens-per-step", type=float, metavar="X", help="adds a projected speed-up")
    add("--vs", choices=["transformers"], help="also time its generate on the same weights")
    add("--plot", metavar="FILE.png", help="draw time per step and speed-up against batch")
    add("--json", metavar="FILE", help="where the document of the last line goes, too")
    args = parser.parse_args(argv)
    if not (args.checkpoint or args.speculator or args.shape) and fastspec.BUNDLED.is_dir():
        args.speculator = str(fastspec.BUNDLED)
    return args


def counts(text: str) -> list[int]:
    values = fastspec.integers(text)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0, such as 4,8")
    return values


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    ranks = fastspec.join_torchrun(partial(Case, args))
    try:
        check_options(args, ranks)
        with tempfile.TemporaryDirectory() as root:
            run(args, ranks, root)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"bench: {fastspec.one_line(error)}", file=sys.stderr)
        return 1
    finally:
        if ranks is not None:
            ranks.close()
    return 0


def check_options(args: argparse.Namespace, ranks) -> None:
    """Refuse what does not go together, and what would fail after the run."""
    length, drafts = args.max_new_tokens, args.speculator or args.shape
    of_drafts = ("tree", "num_draft_tokens", "draft_dtype", "draft_tensor_parallel_size")
    given = [f"--{n.replace('_', '-')}" for n in of_drafts if getattr(args, n) not in (None, [])]
    named = args.checkpoint or args.speculator or args.prompts
    for wrong, message in (
        (args.shape and named, "--shape goes without --checkpoint, --speculator and --prompts"),
        (args.prompts and args.prompt_len, "--prompts goes without --prompt-len"),
        (given and not drafts, f"{''.join(given[:1])} needs --speculator or --shape"),
        (args.top_k_tokens_per_head and not args.tree, "--top-k-tokens-per-head needs --tree"),
        (args.vs and ranks is not None, "--vs goes without torchrun"),
        (args.rounds < 1, f"--rounds {args.rounds}: at least 1"),
        (length < 16, f"--max-new-tokens {length}: at least 16, to time steps"),
    ):
        if wrong:
            raise ValueError(message)
    for name, package in (("vs", "transformers"), ("plot", "matplotlib")):
        if getattr(args, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{name} needs {package}: pip install {package}")
    for file in filter(None, (args.plot, args.json)):
        open(file, "a").close()


def run(args: argparse.Namespace, ranks, root: str) -> None:
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": 0}
    ends = {"max_tokens": args.max_new_tokens, "ignore_eos": args.prompts is None}
    params = SamplingParams(**sampling, **ends)
    target, speculator = args.checkpoint, args.speculator
    if args.shape:
        for part, config in shape_configs(args.shape).items():
            (Path(root) / part).mkdir()
            (Path(root) / part / "config.json").write_text(json.dumps(config))
        target, speculator = f"{root}/target", f"{root}/speculator"
    elif speculator and not target:
        target = fastspec.target_of(speculator, None)
    config = {"model": speculator, "num_speculative_tokens": args.num_draft_tokens, "tree": 0}
    config["draft_dtype"] = args.draft_dtype or "auto"
    config["draft_tensor_parallel_size"] = args.draft_tensor_parallel_size or 1
    target = fastspec.demo_checkpoint() if target is None else target
    models = (target, config if speculator else None)
    where = {"dtype": args.dtype, "device": args.device, "load": False}
    size = 1 if ranks is None else ranks.size
    new_llm = partial(Case, args, *models, **where, tensor_parallel_size=size)
    llm = new_llm(max_seq_len=None if args.prompts else 2)
    most, assumed, steps = max(args.batch), args.assume_tokens_per_step, llm.k + 1
    if assumed is not None and not 1 <= assumed <= steps:
        raise ValueError(f"--assume-tokens-per-step {assumed:g}: a step gives 1 to {steps} tokens")
    if args.prompts:
        requests = file_requests(llm, args.prompts, params)
        longest = max(len(r.prompt) + (r.params.max_tokens or llm.max_seq_len) for r in requests)
        longest = min(-(-longest // 256) * 256, llm.max_seq_len)  # files share compiled steps
        sets = {Path(args.prompts).name: requests}
    else:
        lengths = args.prompt_len or [128]
        longest = max(lengths) + args.max_new_tokens
    new_case = partial(new_llm, max_seq_len=longest)
    modes = len(new_case(batch_size=most).modes)
    largest = new_case(batch_size=most * modes)  # refuses what does not fit
    if not args.prompts:
        sets = {f"{n} tokens": made_requests(largest, n, most, params) for n in lengths}
    document = json.dumps(measure(args, new_case, ranks, sets))
    if args.json:
        Path(args.json).write_text(document + "\n")
    print(document)


def file_requests(llm: LLM, path: str, params: SamplingParams) -> list[Request]:
    chat = fastspec.uses_chat(llm.tokenizer, argparse.Namespace(chat=None, interactive=False))
    rows = list(fastspec.read_rows(llm, path, params, chat))
    if bad := [(line, row) for line, row in rows if not isinstance(row, Request)]:
        raise ValueError(f"{path}:{bad[0][0]}: {bad[0][1]}")
    if not rows:
        raise ValueError(f"{path}: no row to run")
    return [request for _, request in rows]


def made_requests(llm: LLM, length: int, count: int, params: SamplingParams) -> list[Request]:
    """Prompts of this many tokens: of the README's text, each from another place on; random ids
    without a tokenizer."""
    if llm.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(llm.args.vocab_size, (4096,), generator=generator).tolist()
    else:
        ids = llm.tokenizer.encode(Path(__file__).with_name("README.md").read_text("utf-8"))
    prompts = [list(islice(cycle(ids), 97 * i, 97 * i + length)) for i in range(count)]
    return [llm.request(prompt, params, f"prompt {i}") for i, prompt in enumerate(prompts)]


def measure(args, new_case: Callable[..., Case], ranks, sets: dict[str, list[Request]]) -> dict:
    """Print ceiling, floor and rows as they come; the whole as a document."""
    columns = COLUMNS + ([] if args.assume_tokens_per_step is None else [PROJECTED])
    document, rows = {}, []
    with tqdm(unit="run", disable=None, leave=False) as bar:
        for batch in args.batch:
            llm = None  # before the next one takes memory
            llm = new_case(batch_size=batch)
            llm.load(ranks)
            if not document:
                ceiling = llm.engine.ceiling()
                document = describe(llm, ceiling)
                print(table_line(columns), flush=True)
            modes = len(llm.modes) + bool(llm.rival)
            bar.total = (bar.total or 0) + len(sets) * modes * (1 + args.rounds)
            document["compile_s"] += warm_up(llm, sets)
            for label, requests in sets.items():
                count = max(batch, len(requests)) if args.prompts else batch
                for row in measure_rows(llm, list(islice(cycle(requests), count)), ceiling, bar):
                    given = {request.params.temperature for request in requests}
                    temperature = given.pop() if len(given) == 1 else "mixed"
                    row |= {"batch": batch, "prompts": label, "temperature": temperature}
                    tqdm.write(table_line(columns, row))
                    rows.append(row)
    if llm.compiled:  # from inductor's cache alone: a warm start
        counters = torch._dynamo.utils.counters["inductor"]
        document["compiled_graphs"] = counters["fxgraph_cache_miss"]
    print("\n" + LEGEND.format(**document))
    if args.plot:
        draw(rows, args.plot)
    return document | {"rows": rows}


def warm_up(llm: Case, sets: dict[str, list[Request]]) -> float:
    """Compile and capture all that the prompts need; seconds."""
    start = time.perf_counter()
    for mode in range(len(llm.engines)):
        llm.engine.use(mode)
        for requests in sets.values():
            llm.engine.warm_up(*step_needs(r.params for r in requests))
    return time.perf_counter() - start


if __name__ == "__main__":
    fastspec.end(main())
