"""Latency of decode steps, plain and with an MLP speculator, beside what the device could do.

    python bench.py                                        the demo model
    python bench.py --shape llama3-8b --batch 1,4,16       a published pair with random weights
    python bench.py --speculator DIR --prompts FILE.jsonl  real acceptance on real prompts

The ceiling comes first: the bandwidth at which this device reads and the rate at which it
multiplies, both measured. A step's floor is the bytes it must read, or the products it must do, at
these rates. Modes of one case alternate in rounds; a first round is warm-up and not counted. A
step's time is the median over the rounds of the median between two results that reach the host.
The last line of stdout is one JSON document.

Reads downward: shapes, ceiling, what a step needs, runs, rows, output, the command line.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from torch import Tensor

from fastspec import (
    LLM,
    Engine,
    Request,
    SamplingParams,
    demo_checkpoint,
    one_line,
    pack_linears,
    progress,
    read_rows,
    step_needs,
    target_of,
    uses_chat,
)
from model import Transformer, hf_tensors, load_model, read_json, rope_frequencies
from speculator import MLPSpeculator, SpeculatorArgs, load_speculator

# --- shapes: the published pairs, by the fields of their config.json ----------------------------


LLAMA_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)
BIGCODE_KEYS = (
    *("n_embd", "n_layer", "n_head", "multi_query", "n_inner", "vocab_size", "n_positions"),
)
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA3 = LLAMA | {"rope_theta": 5e5}
GRANITE = LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
BIGCODE = {"model_type": "gpt_bigcode"}
TIED = {"tie_weights": True}
SCALED = TIED | {"scale_input": True}

# hidden, layers, heads, KV heads, feed-forward, vocabulary, context, and more of the target;
# inner_dim, n_predict, and more of the speculator
SHAPES = {
    "llama2-13b": ((5120, 40, 40, 40, 13824, 32000, 4096), LLAMA, 4096, 3, {}),
    "llama2-70b": ((8192, 80, 64, 8, 28672, 32000, 4096), LLAMA, 8192, 4, SCALED),
    "llama3-8b": ((4096, 32, 32, 8, 14336, 128256, 8192), LLAMA3, 3072, 4, {}),
    "llama3-70b": ((8192, 80, 64, 8, 28672, 128256, 8192), LLAMA3, 8192, 4, SCALED),
    "codellama-34b": (
        *((8192, 48, 64, 8, 22016, 32000, 16384), LLAMA | {"rope_theta": 1e6}, 8192, 5, SCALED),
    ),
    "granite-3b": ((2560, 32, 32, 32, 10240, 49152, 2048), GRANITE, 4096, 5, TIED),
    "granite-7b": ((4096, 32, 32, 32, 11008, 32008, 4096), LLAMA, 4096, 5, {}),
    "granite-8b": ((4096, 36, 32, 8, 14336, 49152, 4096), GRANITE, 4096, 5, {}),
    "granite-20b": ((6144, 52, 48, True, 24576, 49152, 8192), BIGCODE, 4096, 4, {}),
}


def shape_configs(name: str) -> tuple[dict, dict]:
    """config.json of target and speculator."""
    sizes, target, inner_dim, n_predict, speculator = SHAPES[name]
    keys = BIGCODE_KEYS if target is BIGCODE else LLAMA_KEYS
    widths = {"emb_dim": sizes[0], "inner_dim": inner_dim, "vocab_size": sizes[5]}
    drafts = {"model_type": "mlp_speculator", "n_predict": n_predict}
    return target | dict(zip(keys, sizes, strict=True)), drafts | widths | speculator


@contextmanager
def shape_directories(name: str | None) -> Iterator[tuple[str | None, str | None]]:
    """Directories of target and speculator that hold a shape's config.json and nothing else."""
    if name is None:
        yield None, None
        return
    if name not in SHAPES:
        raise ValueError(f"--shape {name!r} is not known; known: {', '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as root:
        for part, config in zip(("target", "speculator"), shape_configs(name), strict=True):
            (Path(root) / part).mkdir()
            (Path(root) / part / "config.json").write_text(json.dumps(config))
        yield f"{root}/target", f"{root}/speculator"


def random_weights(module: nn.Module, llm: LLM) -> nn.Module:
    """Fill a module of the meta device: norms change nothing, all else is normal."""
    module = module.to(llm.dtype).to_empty(device=llm.device).requires_grad_(False)
    if isinstance(module, Transformer):
        module.inv_freq = rope_frequencies(module.args).to(llm.device)
        if module.args.tie_embeddings:
            module.output.weight = module.embed.weight
    generator = torch.Generator(llm.device).manual_seed(0)
    for name, param in module.named_parameters():
        if param.dim() > 1:
            param.normal_(0, 0.02, generator=generator)
        else:
            param.fill_(float(name.endswith("weight")))
    return module.eval()


# --- the ceiling -------------------------------------------------------------------------------


class Ceiling(NamedTuple):
    bytes_per_s: float
    flops_per_s: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable, device: torch.device, repeats: int) -> float:
    """Seconds of one call: best of five series, queued without a wait in between."""
    series = []
    work()
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        series.append((time.perf_counter() - start) / repeats)
    return min(series)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """How fast the device reads (a sum over far more than its caches hold) and multiplies."""
    size, width, repeats = 2**28, 1024, 2
    if device.type == "cuda":
        size, width, repeats = min(2**32, torch.cuda.mem_get_info(device)[0] // 2), 8192, 20
    buffer = torch.ones(size // 4, device=device)
    read = size / best_seconds(buffer.sum, device, repeats)
    square = torch.ones(width, width, device=device, dtype=dtype)
    product = 2 * width**3 / best_seconds(partial(torch.mm, square, square), device, repeats)
    return Ceiling(read, product)


# --- what a step needs -------------------------------------------------------------------------


class Weights(NamedTuple):
    """Weights that a forward reads: how many, and their bytes as they are stored."""

    numbers: int
    nbytes: int


def count_weights(*modules: nn.Module) -> Weights:
    """One entry per use: a tied module is read as often as it is used."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return Weights(sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))


def target_weights(model: Transformer) -> Weights:
    """Without the embedding tables, of which a step reads a few rows; tied, the table counts as
    the output layer."""
    return count_weights(model.layers, model.norm, model.output)


def draft_weights(speculator: MLPSpeculator, k: int) -> Weights:
    """Of k heads, without the embedding tables."""
    used: list[nn.Module] = []
    for i in range(k):
        shared = 0 if speculator.args.tie_weights else i
        used += [speculator.proj[min(i, len(speculator.proj) - 1)]]
        used += [speculator.ln[shared], speculator.head[shared]]
    return count_weights(*used)


def kv_token_bytes(engine: Engine) -> int:
    """Keys and values of one token in all layers."""
    return engine.kv[:, :, 0, :, 0].numel() * engine.kv.element_size()


class Need(NamedTuple):
    """What one step must read and multiply."""

    nbytes: float
    flops: float

    def floor_ms(self, ceiling: Ceiling) -> float:
        seconds = max(self.nbytes / ceiling.bytes_per_s, self.flops / ceiling.flops_per_s)
        return 1000 * seconds


def step_need(
    target: Weights, draft: Weights, engine: Engine, nodes: int, live: float, draft_rows: int
) -> Need:
    """Of a step of all rows with `nodes` candidates each, and `live` tokens cached per row."""
    B, args = engine.batch_size, engine.model.args
    attention = 4 * B * nodes * live * args.n_layers * args.n_heads * args.head_dim
    products = 2 * (target.numbers * B * nodes + draft.numbers * draft_rows)
    cache = B * live * kv_token_bytes(engine)
    return Need(target.nbytes + draft.nbytes + cache, products + attention)


# --- runs --------------------------------------------------------------------------------------

ROUNDS = 3  # of every mode, after one that is warm-up


@dataclass
class Run:
    """One pass over the prompts."""

    step_ms: float  # median
    ttft_ms: float  # median
    tokens: int  # of all rows
    steps: int  # of all rows
    live: float  # tokens in a row's cache, mean over the steps
    seconds: float  # with prefill
    peak_gb: float


class ClockedEngine(Engine):
    """Notes when each step's result is there."""

    clock: list[float]

    def wait(self, packet) -> list[list[int]]:
        columns = super().wait(packet)
        self.clock.append(time.perf_counter())
        return columns


def run_summary(
    clock: list[float], first: list[float], answers: list[tuple[int, int, int]], seconds: float
) -> Run:
    """From the times of results, seconds to first tokens and (prompt, answer, steps) lengths."""
    if len(clock) < 3:
        raise ValueError("the answers end within two steps, too short to time; use other prompts")
    gaps = [after - before for before, after in pairwise(clock)]
    steps = sum(n for _, _, n in answers)
    live = sum((prompt + answer / 2) * n for prompt, answer, n in answers) / steps
    return Run(
        step_ms=1000 * statistics.median(gaps),
        ttft_ms=1000 * statistics.median(first),
        tokens=sum(answer for _, answer, _ in answers),
        steps=steps,
        live=live,
        seconds=seconds,
        peak_gb=peak_gb(),
    )


def peak_gb() -> float:
    """On a GPU since the last reset; else the whole process's so far."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run_engine(llm: LLM, engine: ClockedEngine, requests: list[Request]) -> Run:
    """Through the whole of `LLM`: host loop, ends and text as in use."""
    llm.engine, llm.k, engine.clock = engine, engine.k, []
    start = time.perf_counter()
    outputs = [output for *_, output in llm.run(requests) if output is not None]
    seconds = time.perf_counter() - start
    answers = [(len(o.prompt_token_ids), len(o.outputs[0].token_ids), o.steps) for o in outputs]
    return run_summary(engine.clock, [o.time_to_first_token for o in outputs], answers, seconds)


def transformers_model(llm: LLM, tensors: dict[str, Tensor]):
    """transformers' model over the same weights, by their Hugging Face names."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(llm.directory)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=llm.dtype)
    model = model.to(llm.device).eval()
    model.load_state_dict(
        tensors, strict=False, assign=True
    )  # in place of copies by way of the host
    model.tie_weights()
    return model


@torch.inference_mode()
def run_transformers(model, llm: LLM, batch: int, requests: list[Request]) -> Run:
    """`generate` on groups of `batch` prompts, padded on the left. On a GPU with its static cache,
    which it compiles; every group has the settings of its first row."""
    from transformers import GenerationConfig

    clock, first, answers = [], [], []

    def tick(ids, scores, **_):
        synchronize(llm.device)
        clock.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    begin = time.perf_counter()
    for at in range(0, len(requests), batch):
        group = requests[at : at + batch]
        params, ends, width = group[0].params, group[0].stop_ids, max(len(r.prompt) for r in group)
        ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in group])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in group])
        sampling = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        model.generation_config = GenerationConfig(
            max_new_tokens=params.max_tokens,
            eos_token_id=ends or None,
            pad_token_id=0,
            do_sample=params.temperature > 0,
            cache_implementation="static" if llm.compiled else None,
            **(sampling if params.temperature > 0 else {}),
        )
        start, ticks = time.perf_counter(), len(clock)
        ids, mask = ids.to(llm.device), mask.to(llm.device)
        out = model.generate(ids, attention_mask=mask, stopping_criteria=[tick])[:, width:]
        first += [clock[ticks] - start] * len(group)
        for request, row in zip(group, out.tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            answers.append((len(request.prompt), length, length))
    return run_summary(clock, first, answers, time.perf_counter() - begin)


# draft and verify alone: parts of Engine.decode_step, each as a compiled function of its own


def draft_alone(engine: Engine, noisy: bool) -> Tensor:
    root = engine.length - 1
    return engine.draft(engine.tokens.gather(1, root[:, None])[:, 0], root, noisy)


def verify_alone(engine: Engine, live: int | None, noisy: bool, filtered: bool):
    kv, root = engine.kv if live is None else engine.kv[..., :live, :], engine.length - 1
    positions = root[:, None] + engine.depth
    candidates = engine.tokens.gather(1, positions)
    hidden, new_kv = engine.verify(candidates, positions, kv, root, engine.ancestors)
    logits = engine.logits(hidden)
    return engine.choose(logits, positions + 1, None, noisy, filtered, engine.ranks), new_kv


@torch.inference_mode()
def time_parts(engine: Engine, live: float, noisy: bool, filtered: bool) -> tuple[float, float]:
    """Milliseconds of draft and of verify alone, with `live` tokens in every row's cache."""
    engine.length.fill_(int(live))
    slots = None if engine.compiled else int(live) - 1
    parts = ((draft_alone, (noisy,)), (verify_alone, (slots, noisy, filtered)))
    times = []
    for part, args in parts:
        if engine.compiled:
            part = torch.compile(part, mode="reduce-overhead", fullgraph=True)
        for _ in range(3 if engine.compiled else 1):  # compile, capture, replay
            part(engine, *args)
        repeats = 20 if engine.compiled else 2
        times.append(1000 * best_seconds(partial(part, engine, *args), engine.kv.device, repeats))
    return times[0], times[1]


# --- rows --------------------------------------------------------------------------------------


class Mode(NamedTuple):
    name: str
    nodes: int  # candidates per row and step
    options: dict  # of Engine


def modes(k: int) -> list[Mode]:
    """Plain decoding first: every other mode's speed-up is against it."""
    found = [Mode("plain", 1, {"num_draft_tokens": 0})]
    if k:
        found.append(Mode("chain", k + 1, {"num_draft_tokens": k}))
    return found


@dataclass
class Loaded:
    """Both models, and what a step reads of them."""

    target: Transformer
    speculator: MLPSpeculator | None
    target_weights: Weights
    draft_weights: Weights
    rival: nn.Module | None  # transformers' model
    seconds: float


def load(llm: LLM, random: bool, vs: str | None) -> Loaded:
    """Read the weights, or make them up."""
    start, speculator = time.perf_counter(), None
    if random:
        with torch.device("meta"):
            target = Transformer(llm.args)
            if llm.k:
                config = read_json(llm.speculator_dir / "config.json")
                speculator = MLPSpeculator(SpeculatorArgs.from_config(config))
        target = random_weights(target, llm)
        speculator = speculator and random_weights(speculator, llm)
    else:
        where = (llm.device, llm.dtype)
        target = load_model(llm.directory, *where, progress("target"))
        if llm.k:
            speculator = load_speculator(llm.speculator_dir, *where, progress("speculator"))
    synchronize(llm.device)
    seconds = time.perf_counter() - start
    rival = transformers_model(llm, hf_tensors(target)) if vs else None
    draft = draft_weights(speculator, llm.k) if speculator else Weights(0, 0)
    loaded = Loaded(target, speculator, target_weights(target), draft, rival, seconds)
    if llm.packed:  # after counting: packed layers have no parameters
        for module in filter(None, (target, speculator)):
            pack_linears(module)
    return loaded


def new_engines(
    llm: LLM, loaded: Loaded, kinds: list[Mode], batch: int
) -> list[tuple[Mode, ClockedEngine]]:
    sizes = {"batch_size": batch, "max_seq_len": llm.max_seq_len, "compiled": llm.compiled}
    sizes["eight_bit_draft"] = llm.draft_dtype == "int8"
    return [
        (mode, ClockedEngine(loaded.target, loaded.speculator, **mode.options, **sizes))
        for mode in kinds
    ]


def measure_rounds(runners: dict[str, Callable[[], Run]], bar) -> dict[str, list[Run]]:
    """Runs of each mode, alternating, without the first."""
    runs: dict[str, list[Run]] = {name: [] for name in runners}
    for _ in range(1 + ROUNDS):
        for name, runner in runners.items():
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            runs[name].append(runner())
            bar.update()
    return {name: of_mode[1:] for name, of_mode in runs.items()}


def new_row(name: str, nodes: int, runs: list[Run], need: Need, ceiling: Ceiling) -> dict:
    """Times, counts and shares of one mode; what compares it with others comes later."""
    step_ms = statistics.median(run.step_ms for run in runs)
    tokens_per_step = sum(run.tokens for run in runs) / sum(run.steps for run in runs)
    floor_ms = need.floor_ms(ceiling)
    return {
        "mode": name,
        "nodes": nodes,
        "ms_per_step": step_ms,
        "draft_ms": None,
        "verify_ms": None,
        "tokens_per_step": tokens_per_step,
        "tokens_per_s": 1000 * tokens_per_step / step_ms,  # of one sequence, while it decodes
        "total_tokens_per_s": sum(run.tokens for run in runs) / sum(run.seconds for run in runs),
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / step_ms,
        "gb_per_step": need.nbytes / 1e9,
        "ttft_ms": statistics.median(run.ttft_ms for run in runs),
        "peak_gb": max(run.peak_gb for run in runs),
    }


NOT_REAL = ("tokens_per_step", "tokens_per_s", "total_tokens_per_s")  # of random drafts


def compare(rows: list[dict], random: bool, assumed: float | None) -> None:
    """Speed-up of each row over the first, plain one. Random drafts have none, but a projected
    one, for an assumed number of tokens per step."""
    plain = rows[0]["tokens_per_s"]
    for row in rows:
        if random and row["nodes"] > 1:
            row |= dict.fromkeys(NOT_REAL)
        rate = row["tokens_per_s"]
        row["speedup"] = None if rate is None else rate / plain
        if assumed is not None:
            projected = assumed * rows[0]["ms_per_step"] / row["ms_per_step"]
            row["projected_speedup"] = projected if row["nodes"] > 1 else None


def measure_case(
    llm: LLM, loaded: Loaded, engines: list, requests: list[Request], ceiling: Ceiling, args, bar
) -> list[dict]:
    """Rows of one batch size and set of prompts, plain decoding first."""
    runners = {m.name: partial(run_engine, llm, e, requests) for m, e in engines}
    batch, needs = engines[0][1].batch_size, step_needs(r.params for r in requests)
    if loaded.rival:
        runners["transformers"] = partial(run_transformers, loaded.rival, llm, batch, requests)
    runs, rows, needed = measure_rounds(runners, bar), [], []
    for mode, engine in engines:
        live = statistics.mean(run.live for run in runs[mode.name])
        draft = loaded.draft_weights if mode.nodes > 1 else Weights(0, 0)
        if mode.nodes > 1 and llm.draft_dtype == "int8":  # the engine has replaced its heads
            draft = draft_weights(engine.speculator, llm.k)
        need = step_need(loaded.target_weights, draft, engine, mode.nodes, live, batch)
        needed.append(need)
        rows.append(new_row(mode.name, mode.nodes, runs[mode.name], need, ceiling))
        if mode.nodes > 1 and (args.split or (args.split is None and not llm.compiled)):
            parts = time_parts(engine, live, *needs)
            rows[-1]["draft_ms"], rows[-1]["verify_ms"] = parts
    if loaded.rival:  # needs what plain decoding does
        rows.append(new_row("transformers", 1, runs["transformers"], needed[0], ceiling))
    compare(rows, args.shape is not None, args.assume_tokens_per_step)
    return rows


# --- output ------------------------------------------------------------------------------------

# Title, and what a row shows below it.
COLUMNS: dict[str, Callable[[dict], str]] = {
    "mode        ": lambda r: r["mode"],
    "nodes": lambda r: str(r["nodes"]),
    "batch": lambda r: str(r["batch"]),
    "prompts       ": lambda r: r["prompts"][:14],
    "  T": lambda r: f"{r['temperature']:g}",
    " ms/step": lambda r: number(r["ms_per_step"], 3),
    "  draft": lambda r: number(r["draft_ms"], 3),
    " verify": lambda r: number(r["verify_ms"], 3),
    "   rest": lambda r: number(rest_ms(r), 3),
    "tok/step": lambda r: number(r["tokens_per_step"], 2),
    " tok/s": lambda r: number(r["tokens_per_s"], 1),
    " total": lambda r: number(r["total_tokens_per_s"], 1),
    "speed-up": lambda r: number(r["speedup"], 2),
    "  floor": lambda r: number(r["floor_ms"], 3),
    "share": lambda r: f"{r['floor_fraction']:.0%}",
    "   ttft": lambda r: number(r["ttft_ms"], 1),
    "peak GB": lambda r: number(r["peak_gb"], 1),
}
PROJECTED = {"projected": lambda r: number(r["projected_speedup"], 2)}
LEGEND = """\
ms/step = draft + verify + rest (alone, where timed); tok/s of one sequence while it decodes, total
of all with their prefill; floor in ms, share = floor / step; ttft in ms; peak GB with the caches of
all modes in memory."""


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def rest_ms(row: dict) -> float | None:
    """Choosing what to accept, committing it, the host's part."""
    if row["draft_ms"] is None:
        return None
    return row["ms_per_step"] - row["draft_ms"] - row["verify_ms"]


def table_line(columns: dict, row: dict | None = None) -> str:
    """A row, or the titles; titles that end in spaces head text, others numbers."""
    cells = []
    for title, show in columns.items():
        text, width = title if row is None else show(row), len(title)
        cells.append(text.ljust(width) if title.endswith(" ") else text.rjust(width))
    return "  ".join(cells).rstrip()


def describe_ceiling(device: str, ceiling: Ceiling, dtype: torch.dtype) -> str:
    return (
        f"{device}: reads {ceiling.bytes_per_s / 1e9:.0f} GB/s, multiplies {dtype_name(dtype)} "
        f"at {ceiling.flops_per_s / 1e12:.2f} TFLOP/s (both measured)"
    )


def describe_floor(loaded: Loaded, ceiling: Ceiling) -> str:
    target, draft = loaded.target_weights.nbytes, loaded.draft_weights.nbytes
    lines = [f"weights read per step: target {target / 1e9:.3f} GB, draft {draft / 1e9:.3f} GB"]
    for what, nbytes in (("plain", target), ("with drafts", target + draft)):
        if what == "plain" or draft:
            lines.append(f"{what} at least {1000 * nbytes / ceiling.bytes_per_s:.3f} ms")
    return "; ".join(lines) + ", and the cache"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"


def rounded(value):
    """Floats to six significant digits, anywhere in a document."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def draw(rows: list[dict], file: str) -> None:
    """Milliseconds per step and speed-up against batch, one line per mode and set of prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    speed = "projected_speedup" if "projected_speedup" in rows[0] else "speedup"
    for plot, key in zip(axes, ("ms_per_step", speed), strict=True):
        for mode, prompts in dict.fromkeys((row["mode"], row["prompts"]) for row in rows):
            line = [row for row in rows if (row["mode"], row["prompts"]) == (mode, prompts)]
            line = [(row["batch"], row[key]) for row in line if row[key] is not None]
            if line:
                plot.plot(*zip(*line, strict=True), marker="o", label=f"{mode}, {prompts}")
        plot.set(xlabel="batch", xticks=sorted({row["batch"] for row in rows}), ylabel=key)
        plot.set_ylim(bottom=0)
        plot.legend()
    figure.savefig(file, format="png", dpi=150)


# --- command line ------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Time decode steps, plain and with an MLP speculator. "
        "Without arguments: the demo model.",
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--checkpoint", help="target model: directory or hub id; unset: the speculator's, or demo")
    add("--speculator", help="MLP speculator: directory or hub id; none: plain decoding alone")
    add("--shape", metavar="NAME", help=f"random weights of a pair: {', '.join(SHAPES)}")
    add("--num-draft-tokens", type=int, help="tokens drafted per step; unset: all heads")
    add("--draft-dtype", default="auto", choices=["auto", "int8"], help="int8: heads in 8 bits")
    add("--batch", type=counts, default=[1], help="rows decoded together, as 1,4,16 (1)")
    add("--prompt-len", type=counts, help="tokens per prompt, as 128,2048 (128)")
    add("--prompts", metavar="FILE", help="JSON lines with prompt or messages, and sampling fields")
    add("--max-new-tokens", type=int, default=64, help="tokens per answer (64)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, help="1, the default, keeps all")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", help="unset: cuda if there is one, else cpu")
    add("--split", action=flag, help="time draft and verify alone; unset: where nothing compiles")
    add("--assume-tokens-per-step", type=float, metavar="X", help="adds a projected speed-up")
    add("--vs", choices=["transformers"], help="also time its generate on the same weights")
    add("--plot", metavar="FILE.png", help="draw time per step and speed-up against batch")
    add("--json", metavar="FILE", help="where the document of the last line goes, too")
    return parser.parse_args(argv)


def counts(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    try:
        with shape_directories(args.shape) as directories:
            run(args, *directories)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"bench: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace, target: str | None, speculator: str | None) -> None:
    check_options(args)
    params = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_new_tokens,
        seed=0,
        ignore_eos=args.prompts is None,
    )
    speculator = speculator or args.speculator
    target = target or args.checkpoint or (speculator and target_of(speculator, None))
    open_pair = partial(open_model, args, target or demo_checkpoint(), speculator)
    llm = open_pair(None if args.prompts else 2, 1)
    check_assumed(args.assume_tokens_per_step, llm.k)
    if args.prompts:
        given = file_requests(llm, args.prompts, params)
        longest = max(len(r.prompt) + (r.params.max_tokens or llm.max_seq_len) for r in given)
        longest = min(longest, llm.max_seq_len)
    else:
        longest = max(args.prompt_len) + args.max_new_tokens
    # The engines of all modes are there at once.
    llm = open_pair(longest, max(args.batch) * len(modes(llm.k)))
    if args.prompts:
        sets = {Path(args.prompts).name: given}
    else:
        rows = max(args.batch)
        sets = {f"{n} tokens": made_requests(llm, n, rows, params) for n in args.prompt_len}
    document = measure(llm, sets, args)
    text = json.dumps(rounded(document))
    if args.plot:
        draw(document["rows"], args.plot)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and what would fail after the run."""
    if args.shape and (args.checkpoint or args.speculator or args.prompts):
        raise ValueError("--shape goes without --checkpoint, --speculator and --prompts")
    if args.prompts and args.prompt_len:
        raise ValueError("--prompts goes without --prompt-len")
    if args.num_draft_tokens is not None and not (args.speculator or args.shape):
        raise ValueError("--num-draft-tokens needs --speculator or --shape")
    if args.max_new_tokens < 16:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: at least 16, to time steps")
    for option, package in ((args.vs, "transformers"), (args.plot, "matplotlib")):
        if option and importlib.util.find_spec(package) is None:
            which = "--vs" if option == args.vs else "--plot"
            raise ValueError(f"{which} needs {package}: pip install {package}")
    for file in (args.plot, args.json):
        if file:
            open(file, "a").close()
    args.prompt_len = args.prompt_len or [128]


def check_assumed(assumed: float | None, k: int) -> None:
    if assumed is not None and not 1 <= assumed <= k + 1:
        raise ValueError(f"--assume-tokens-per-step {assumed:g}: a step gives 1 to {k + 1} tokens")


def open_model(
    args, target: str | Path, speculator: str | None, max_seq_len: int | None, rows: int
) -> LLM:
    """Configs and tokenizer alone; refuses what does not fit into memory."""
    config = {"model": speculator, "num_speculative_tokens": args.num_draft_tokens}
    config["draft_dtype"] = args.draft_dtype
    return LLM(
        target,
        config if speculator else None,
        dtype=args.dtype,
        device=args.device,
        batch_size=rows,
        max_seq_len=max_seq_len,
        load=False,
    )


def file_requests(llm: LLM, path: str, params: SamplingParams) -> list[Request]:
    chat = uses_chat(llm.tokenizer, argparse.Namespace(chat=None, interactive=False))
    requests = []
    for line, row in read_rows(llm, path, params, chat):
        if not isinstance(row, Request):
            raise ValueError(f"{path}:{line}: {row}")
        requests.append(row)
    if not requests:
        raise ValueError(f"{path}: no row to run")
    return requests


def made_requests(llm: LLM, length: int, count: int, params: SamplingParams) -> list[Request]:
    """Prompts of this many tokens: of the README's text, each from another place on; random ids
    without a tokenizer."""
    if llm.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(llm.args.vocab_size, (4096,), generator=generator).tolist()
    else:
        ids = llm.tokenizer.encode(Path(__file__).with_name("README.md").read_text("utf-8"))
    starts = range(0, 97 * count, 97)
    prompts = [list(islice(cycle(ids), start, start + length)) for start in starts]
    return [llm.request(prompt, params, f"prompt {i}") for i, prompt in enumerate(prompts)]


def measure(llm: LLM, sets: dict[str, list[Request]], args: argparse.Namespace) -> dict:
    """Print ceiling, floor and rows as they come; the whole as a document."""
    ceiling = measure_ceiling(llm.device, llm.dtype)
    torch.cuda.empty_cache()
    device, random = device_name(llm.device), args.shape is not None
    print(describe_ceiling(device, ceiling, llm.dtype))
    loaded = load(llm, random, args.vs)
    names = (args.shape, args.shape) if random else (llm.directory.name, args.speculator)
    print(f"model {names[0]}, speculator {names[1] or 'none'}, torch {torch.__version__}")
    if random:
        print("RANDOM WEIGHTS: time per step is real; acceptance and text are not")
    print(describe_floor(loaded, ceiling))
    print(f"{ROUNDS} rounds after one of warm-up, modes alternating; medians\n")
    columns = COLUMNS | ({} if args.assume_tokens_per_step is None else PROJECTED)
    print(table_line(columns), flush=True)
    all_rows, compile_s, kinds = [], 0.0, modes(llm.k)
    total = len(args.batch) * len(sets) * (len(kinds) + bool(args.vs)) * (1 + ROUNDS)
    with tqdm(total=total, unit="run", disable=None, leave=False) as bar:
        for batch in args.batch:
            engines = new_engines(llm, loaded, kinds, batch)
            compile_s += warm_up(engines, sets)
            for label, requests in sets.items():
                count = max(batch, len(requests)) if args.prompts else batch
                taken = list(islice(cycle(requests), count))
                rows = measure_case(llm, loaded, engines, taken, ceiling, args, bar)
                for row in rows:
                    row |= {"batch": batch, "prompts": label, "temperature": args.temperature}
                    tqdm.write(table_line(columns, row))
                all_rows += rows
            del engines, llm.engine
            torch._dynamo.reset()  # frees the graphs of this batch size
            gc.collect()
    print(f"\n{LEGEND}")
    print(f"load {loaded.seconds:.1f} s, compile and capture {compile_s:.1f} s\n")
    return {
        "device": device,
        "torch": torch.__version__,
        "dtype": dtype_name(llm.dtype),
        "model": str(names[0]),
        "speculator": names[1] and str(names[1]),
        "random_weights": random,
        "ceiling_gb_s": ceiling.bytes_per_s / 1e9,
        "ceiling_tflop_s": ceiling.flops_per_s / 1e12,
        "load_s": loaded.seconds,
        "compile_s": compile_s,
        "max_new_tokens": args.max_new_tokens,
        "top_p": args.top_p,
        "rows": all_rows,
    }


def warm_up(engines: list[tuple[Mode, ClockedEngine]], sets: dict[str, list[Request]]) -> float:
    """Compile and capture all that the prompts need; seconds."""
    start = time.perf_counter()
    for _, engine in engines:
        engine.clock = []
        for requests in sets.values():
            engine.warm_up(*step_needs(r.params for r in requests))
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
