"""Train an MLP speculator for a target model, in the format of the published accelerators.

    python train.py --checkpoint TARGET --prompts FILE.jsonl ... --output DIR

The target answers the prompts itself; what is learnt is what it does in these answers. All is kept
in DIR, of the training what was done a minute ago: the same command goes on from there.
Letters as in fastspec.py, with M positions, n heads, B texts padded to C tokens."""

import gc
import hashlib
import json
import math
import os
import random
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from fastspec import (
    LLM,
    Engine,
    Request,
    SamplingParams,
    as_request,
    check_is_file,
    decode_loop,
    one_line,
    row_of,
)
from model import (
    SDPA_BACKENDS,
    ModelArgs,
    Transformer,
    kv_cache_shape,
    load_model,
    own_kv,
    read_json,
)
from speculator import MLPSpeculator, SpeculatorArgs, load_speculator

# --- prompts and text --------------------------------------------------------------------------

Text = tuple[list[int], list[int]]  # a prompt, and the target's answer to it
HELD_OUT = 50  # every 50th prompt is for evaluation only
PROMPT_TOKENS = 512  # for which there is room before an answer of full length
SAMPLED = 0.8  # temperature of the texts that are not greedy
BEGUN = 6  # tokens of a given prompt, at most, with which the target begins one of its own
RUN = 13  # words in a row that no prompt of its own shares with an evaluation prompt
CUTS = 4  # beginnings to complete of a code block
COMPLETE = ("Complete this code.", "Finish this program:", "Write the rest:", "Go on with this:")


def read_prompts(llm: LLM, files: list, least: int = 1) -> list[Request]:
    """A request for each different {"prompt": text} or {"messages": [...]} in lines of JSON. What
    cannot be used is reported by its line and left out."""
    found: dict[tuple, Request] = {}
    for file in files:
        for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
            if line.strip():
                try:
                    request = as_request(llm, row_of(line), SamplingParams(), chat=True)
                    found.setdefault(tuple(request.prompt), request)
                except (ValueError, RecursionError) as error:
                    print(f"train: {file}:{number} is left out: {one_line(error)}", file=sys.stderr)
    if len(found) < least:
        raise ValueError(f"{', '.join(files)}: {len(found)} prompts; at least {least} needed")
    return random.Random(0).sample(list(found.values()), len(found))


def new_bar(*args, **options) -> tqdm:
    """A bar of the first process; in a log it moves once a minute."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(*args, mininterval=seconds, disable=int(os.environ.get("RANK", 0)) > 0, **options)


def asked(prompts: list[Request], temperatures: list[float], args: Namespace) -> list[Request]:
    """Every prompt at each temperature, each with a seed of its own."""
    pairs = [(prompt, temperature) for prompt in prompts for temperature in temperatures]
    params = {t: SamplingParams(temperature=t, max_tokens=args.max_new_tokens) for _, t in pairs}
    return [replace(p, params=params[t], seed=args.seed + i) for i, (p, t) in enumerate(pairs)]


def write_text(engine: Engine, requests: list[Request], file: Path, most=math.inf) -> list[Text]:
    """Let the target answer all requests, until there are `most` tokens. What `file` holds of them
    from an earlier run is not done again; a line that was left half written is cut off."""
    file.touch()
    lines = [row for row in file.read_bytes().splitlines(keepends=True) if row.endswith(b"\n")]
    os.truncate(file, sum(map(len, lines)))
    done = dict(map(json.loads, lines))  # request number: answer
    total = sum(map(len, done.values()))
    last = max(done, default=-1)  # all before it were begun, and what was begun is finished
    answers: list[list[int]] = []

    def wanted(i: int) -> bool:
        return total < most or i < last

    todo = [i for i in range(len(requests)) if i not in done and wanted(i)]

    def taken() -> Iterator[Request]:
        for i in todo:
            if wanted(i):
                answers.append([])
                yield requests[i]

    needs = (True, False)  # greedy requests, too: one captured step writes all of the text
    steps = decode_loop(engine, taken(), needs) if todo else ()  # else there is nothing to capture
    bar = new_bar(total=len(requests), initial=len(done), desc=file.stem, unit="row")
    with bar, open(file, "a", buffering=1) as out:  # a kill loses no whole line
        for progress in steps:
            answers[progress.request] += progress.tokens
            if progress.done:
                number, answer = todo[progress.request], answers[progress.request]
                out.write(json.dumps([number, answer]) + "\n")
                done[number] = answer
                total += len(answer)
                bar.update()
    texts, total = [], 0  # the first ones that have `most` tokens, whichever were finished first
    for i in sorted(done) if most > 0 else ():
        texts.append((requests[i].prompt, done[i]))
        total += len(done[i])
        if total >= most:
            break
    return texts


def in_turn(prompts: list[Request], args: Namespace) -> list[Request]:
    """Every prompt once: the first greedily, the second sampled, and so on."""
    return asked(prompts[::2], [0.0], args) + asked(prompts[1::2], [SAMPLED], args)


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def keep_prompts(llm: LLM, texts: Iterable[str], file: Path, apart: set) -> list[Request]:
    """Requests of texts as prompts, without those that share a run of words with `apart`. `file`
    keeps them: once it is there, it counts."""
    if not file.exists():
        rows = [json.dumps({"prompt": text}) for text in texts if not runs(text) & apart]
        write_whole(file, "\n".join(rows))
    elif any(runs(json.loads(row)["prompt"]) & apart for row in file.read_text().splitlines()):
        raise ValueError(f"{file} holds some of the evaluation prompts; choose another --output")
    return read_prompts(llm, [file], least=0)


def write_whole(file: Path, text: str) -> None:
    """All of it, or what was there before."""
    file.with_suffix(".tmp").write_text(text)
    file.with_suffix(".tmp").replace(file)


def code_to_complete(llm: LLM, texts: list[Text]) -> Iterator[str]:
    """The first code block of each answer up to some of its lines, to go on with."""
    rng = random.Random(0)
    for _, answer in texts:
        block = llm.tokenizer.decode(answer).partition("```")[2].partition("```")[0]
        lines = block.splitlines()[1:]  # the first one names the language
        ends = range(1, len(lines) if len(lines) >= 4 else 1)
        for end in rng.sample(ends, min(CUTS, len(ends))):
            code = "\n".join(lines[:end])
            yield f"{rng.choice(COMPLETE)}\n\n{code}"


def in_common(prompts: list[list[int]]) -> int:
    """Tokens with which all of these, different ones, begin."""
    columns = zip(*prompts, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)


def training_text(
    llm: LLM, engine: Engine, prompts: list[Request], sets: dict, args: Namespace
) -> list[Text]:
    """This rank's answers: to the prompts, greedy and sampled; to prompts that the target writes
    itself, each begun with the first words of one; to the beginnings of the code in all these."""
    opening = in_common([p.prompt for p in prompts])  # of the chat template
    closing = in_common([p.prompt[::-1] for p in prompts])
    evaluation = [llm.tokenizer.decode(p.prompt[opening:]) for p in chain(*sets.values())]
    apart = set().union(*map(runs, evaluation))
    texts: list[Text] = []

    def file(name: str) -> Path:
        return args.output / f"{name}-{args.rank}-of-{args.world}.jsonl"

    def write(requests: list[Request], name: str) -> list[Text]:
        most = (args.tokens or math.inf) / args.world - sum(len(answer) for _, answer in texts)
        return write_text(engine, requests, file(name), most)

    given = prompts[args.rank :: args.world]
    texts += write(asked(given, [0.0, SAMPLED], args), "text")
    rng = random.Random(args.seed)
    begun = [
        replace(p, prompt=p.prompt[: opening + rng.randint(1, min(BEGUN, room))])
        for p in given * args.own_prompts
        if (room := len(p.prompt) - opening - closing) > 0
    ]
    written = write(asked(begun, [SAMPLED], args), "begun")
    ended = (
        llm.tokenizer.decode([*start[opening:], *rest[:-1]])
        for start, rest in written
        if rest[-1] in begun[0].stop_ids
    )
    own = keep_prompts(llm, ended, file("own-prompts"), apart)
    texts += write(in_turn(own, args), "own")
    code = keep_prompts(llm, code_to_complete(llm, texts), file("code-prompts"), apart)
    return texts + write(in_turn(code, args), "code")


# --- hidden states and loss ---------------------------------------------------------------------

FORWARD_TOKENS = 32768  # that the frozen target computes together
HALVED = (2, 4)  # heads before which half as many positions are drawn


@dataclass
class States:
    """What the target computed where it chose a token of an answer: M positions, text by text."""

    hidden: Tensor  # [M D], after the final norm
    token: Tensor  # [M], the token that was chosen there
    end: Tensor  # [M], where the position's text ends

    def examples(self, at: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For a draft of n tokens from positions `at` [m]: the state [m, D] and the tokens
        [m, n + 1] that follow it, the target's states [m, n, D] that chose all but the first of
        these, and which of them are of the same text [m, n]."""
        where = at[:, None] + torch.arange(n + 1, device=at.device)
        inside = where < self.end[at, None]
        where = where.clamp(max=len(self.token) - 1)
        return self.hidden[at], self.token[where], self.hidden[where[:, 1:]], inside[:, 1:]


def causal_attention(qkv: Tensor, kv: Tensor, *_) -> Tensor:
    """model.py's `plain_attention` of texts with nothing cached: the mask of a batch so large would
    take longer to read than the texts."""
    K = kv.shape[2]
    keys, values = own_kv(qkv, K)
    q = qkv[:, :, : -2 * K].transpose(1, 2)
    y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


@torch.no_grad()
def hidden_states(target: Transformer, texts: list[Text]) -> States:
    """Run the frozen target over these texts, FORWARD_TOKENS at a time."""
    weight = target.embed.weight
    todo = sorted(texts, key=lambda text: -len(text[0] + text[1]))  # little padding
    tokens = torch.tensor([token for _, answer in todo for token in answer]).to(weight.device)
    sizes = torch.tensor([len(answer) for _, answer in todo]).to(weight.device)
    # Filled in place: parts that are joined at the end would take twice the memory.
    hidden, at = weight.new_empty(len(tokens), target.args.dim), 0
    while todo:
        C = len(todo[0][0] + todo[0][1])
        rows = max(1, FORWARD_TOKENS // C)
        batch, todo = todo[:rows], todo[rows:]
        ids = [torch.tensor(prompt + answer) for prompt, answer in batch]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(weight.device)  # [B C]
        kv = weight.new_zeros(kv_cache_shape(target.args, len(batch), 0))
        positions = torch.arange(C, device=weight.device).expand(len(batch), -1)
        none = positions[:, 0]
        with sdpa_kernel(SDPA_BACKENDS):
            states, _ = target(ids, positions, kv, none, none, causal_attention)  # [B C D]
        spans = [(i * C + len(p) - 1, len(a)) for i, (p, a) in enumerate(batch)]
        chose = torch.cat([torch.arange(n) + first for first, n in spans])  # a token of an answer
        hidden[at : (at := at + len(chose))] = states.flatten(0, 1)[chose.to(weight.device)]
    return States(hidden, tokens, sizes.cumsum(0).repeat_interleave(sizes))


class HeadLosses(nn.Module):
    """Cross-entropy of every head against the target's own distribution at T = SAMPLED.

    A head counts only where those before it are right: each position weighs as much as the square
    root of how likely that is, by the probabilities they give to the target's tokens. Later heads
    learn from fewer positions, which are drawn in proportion to that and then weigh the same."""

    def __init__(self, speculator: MLPSpeculator, output: Tensor):
        super().__init__()
        self.speculator, ids = speculator, speculator.draft_ids
        self.register_buffer("output", output if ids is None else output[ids])  # [V or drafted, D]
        if output.is_cuda:
            self.compile()  # fewer copies of logits as wide as the vocabulary

    def forward(self, state: Tensor, tokens: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
        """Loss [n] of the heads; see States.examples for the arguments."""
        losses, speculator = [], self.speculator
        weight, positions = torch.ones(len(state), device=state.device), inside.sum(0)
        state = speculator.start(state)
        for i in range(inside.shape[1]):
            if i in HALVED:
                few, sums = (len(state) + 1) // 2, (weight * inside[:, i]).cumsum(0)
                share = sums[-1] / few
                aim = (torch.arange(few, device=sums.device) + 0.5) * share
                drawn = torch.searchsorted(sums, aim).clamp(max=len(sums) - 1)
                state, tokens, teacher, inside = (
                    x[drawn] for x in (state, tokens, teacher, inside)
                )
                weight = share.expand(few)
            state, logits = speculator.step(i, state, tokens[:, i])
            wanted = (F.linear(teacher[:, i], self.output).float() / SAMPLED).softmax(-1)
            drafted = logits.log_softmax(-1)  # [M, V or drafted]
            loss = -(wanted * drafted).sum(-1) * weight * inside[:, i]
            losses.append(loss.sum() / positions[i].clamp(min=1))
            token, most = tokens[:, i + 1], drafted.shape[1] - 1
            column = token if speculator.emb_row is None else speculator.emb_row[token]
            right = drafted.gather(1, column.clamp(max=most)[:, None])[:, 0].exp()
            weight = weight * (right * (column <= most)).detach().sqrt()
        return torch.stack(losses)


@torch.no_grad()
def accepted_drafts(speculator: MLPSpeculator, states: States) -> Tensor:
    """How many tokens [M] are right, before the first wrong one, drafting greedily everywhere."""
    n, right = speculator.args.n_predict, []
    for at in torch.arange(len(states.token), device=states.token.device).split(4096):
        state, tokens, _, inside = states.examples(at, n)
        drafts = speculator.draft(state.float(), tokens[:, 0], at, n)  # [m n]
        right.append(((drafts == tokens[:, 1:]) & inside).long().cumprod(1).sum(1))
    return torch.cat(right)


def draft_starts(accepted: Tensor, end: Tensor) -> Tensor:
    """At which positions [M] a draft starts when these texts are decoded: at the first of each, and
    then at every token of the target's own after accepted ones, but for a text's last token."""
    starts, stop = torch.zeros_like(end, dtype=torch.bool), end.unique_consecutive()
    at = stop.roll(1) % len(end)  # a text begins where the one before ends
    while (going := at + 1 < stop).any():
        at, stop = at[going], stop[going]
        starts[at] = True
        at = at + accepted[at] + 1
    return starts


def acceptance(speculator: MLPSpeculator, states: States) -> dict:
    """How often head i and those before it are right, drafting greedily at every position; tokens
    per step of decoding, which starts at few of these, and harder ones. There a text's first token
    is a step by itself."""
    accepted = accepted_drafts(speculator, states)
    heads = [(accepted > i).float().mean().item() for i in range(speculator.args.n_predict)]
    steps = len(states.end.unique_consecutive()) + int(draft_starts(accepted, states.end).sum())
    return {"accepted": heads, "tokens_per_step": round(len(accepted) / steps, 4)}


# --- training ----------------------------------------------------------------------------------

LOG_EVERY = 500  # steps
SAVE_SECONDS = 60
CPU_ROOM = 2e9  # bytes of hidden states


def new_speculator(
    args: SpeculatorArgs, texts: list[Text], seed: int, device, table: Tensor | None = None
) -> MLPSpeculator:
    """Random weights as in IBM's trainer; a draft vocabulary is the most frequent tokens. With
    emb_rank, all others begin alike, with what tells them apart in the target's table [V, D]."""
    torch.manual_seed(seed)
    speculator = MLPSpeculator(args)
    for name, param in speculator.named_parameters():
        if not name.startswith("ln."):
            nn.init.normal_(param, std=args.inner_dim**-0.5)
    if args.draft_vocab_size:
        tokens = torch.tensor([token for _, answer in texts for token in answer])
        counts = tokens.bincount(minlength=args.vocab_size).to(device)
        if dist.is_initialized():
            dist.all_reduce(counts)
        order = counts.argsort(descending=True, stable=True)
        speculator.set_draft_ids(order[: args.draft_vocab_size].sort().values)
    if args.emb_rank:
        others = speculator.emb_row.argsort()[args.draft_vocab_size :]
        axes, *_ = torch.pca_lowrank(table[others].float(), args.emb_rank)  # [V - drafted, rank]
        for emb in speculator.emb:
            emb.down.data.copy_(axes * len(others) ** 0.5)  # of variance 1
            nn.init.zeros_(emb.up)
    return speculator.to(device)


def batches(target: Transformer, texts: list[Text], n: int, args: Namespace, start: int):
    """Examples of every step from `start` on. An epoch goes through all texts in shuffled blocks;
    hidden states of more than one block are computed again in every epoch."""
    generator = torch.Generator().manual_seed(args.seed + args.rank)
    weight = target.embed.weight
    room = torch.cuda.mem_get_info()[0] * 0.75 if weight.is_cuda else CPU_ROOM
    most = int(room / (target.args.dim * weight.dtype.itemsize + 32))  # and four integers
    blocks, total, step, loaded = defaultdict(list), 0, 0, None
    for text in texts:
        blocks[total // most].append(text)
        total += len(text[1])
    while True:
        for number, block in blocks.items():
            order = torch.randperm(sum(len(a) - 1 for _, a in block), generator=generator)
            for batch in order.split(args.batch_size)[: max(1, len(order) // args.batch_size)]:
                if step >= start:
                    if loaded != number:
                        states = None  # frees the block before
                        states, loaded = hidden_states(target, block), number
                        starts = (states.end[1:] == states.end[:-1]).nonzero()[:, 0]  # no last one
                    yield states.examples(starts[batch.to(weight.device)], n)
                step += 1


def train(args: Namespace, target: Transformer, losses: HeadLosses, texts: list, held_out: States):
    """Optimise the speculator of `losses`; `args.output` gets metrics.jsonl and state.pt."""
    speculator, device = losses.speculator, held_out.hidden.device
    model = losses if args.world == 1 else DistributedDataParallel(losses, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(
        speculator.parameters(), args.learning_rate, (0.9, 0.95), weight_decay=0.1, fused=True
    )
    warm = max(1, args.steps // 50)  # steps; then a cosine
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * i / args.steps))
    )
    parts = {"speculator": speculator, "optimizer": optimizer, "schedule": schedule}
    file, n = args.output / "state.pt", speculator.args.n_predict
    state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}
    for name in state.keys() & parts:
        parts[name].load_state_dict(state[name])
    start, rows, seen = state.get("step", 0), state.get("rows", []), 0
    clock = saved = time.perf_counter()
    examples = batches(target, texts, n, args, start)
    steps = range(start + 1, args.steps + 1)
    mixed = held_out.hidden.dtype != torch.float32
    bar = new_bar(steps, total=args.steps, initial=start, desc="training")
    for step in bar:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            batch = next(examples)
            loss, seen = model(*batch), seen + len(batch[0])
        loss.sum().backward()
        nn.utils.clip_grad_norm_(speculator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        logged = step % LOG_EVERY == 0 or step == args.steps
        if args.rank == 0 and logged:
            found = loss.tolist()  # waits for the device
            if not math.isfinite(sum(found)):
                raise ValueError(f"the loss is {found} at step {step}; lower --learning-rate")
            seconds = time.perf_counter() - clock
            speed = round(seen * args.world / seconds)
            row = {"step": step, "loss": found, "tokens_per_s": speed}
            rows.append(row | acceptance(speculator, held_out))
            bar.set_postfix_str(f"loss {sum(found):.3f}, {speed} tokens/s", refresh=False)
            write_whole(args.output / "metrics.jsonl", "".join(f"{json.dumps(r)}\n" for r in rows))
            clock, seen = time.perf_counter(), 0
        if args.rank == 0 and (step == args.steps or time.perf_counter() - saved > SAVE_SECONDS):
            state = {name: part.state_dict() for name, part in parts.items()}
            try:
                torch.save(state | {"step": step, "rows": rows}, file.with_suffix(".tmp"))
            except RuntimeError as error:  # as torch calls a full disk
                cannot = f"{file} cannot be written; is the disk full?"
                raise OSError(f"{cannot} ({one_line(error)})") from None
            file.with_suffix(".tmp").replace(file)  # whole, or the one before
            saved = time.perf_counter()


# --- evaluation and files -----------------------------------------------------------------------

SHARD = 2**24 - 2**14  # bytes of tensors in a file: with its header it stays below 16 MiB


def repeated(answer: list[int], n: int = 8) -> int:
    """Tokens that end an n-gram which the answer held before: loops raise acceptance."""
    grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
    return len(grams) - len(set(grams))


def report(args: Namespace, llm: LLM, target: Transformer, sets: dict) -> None:
    """Real speculative decoding with what was written, on each of these sets: report.json."""
    speculator, rows = load_speculator(args.output, llm.device, llm.dtype), []
    llm.k = args.n_predict
    for name, temperature in product(sets, (0.0, 1.0)):
        requests = asked(sets[name], [temperature], args)
        width = {"batch_size": min(len(requests), 128), "max_seq_len": llm.max_seq_len}
        llm.engine = Engine(target, speculator, **width, num_draft_tokens=llm.k)
        llm.engine.all_drafts = True
        outputs = [output for *_, output in llm.run(requests) if output is not None]
        answers = [output.outputs[0].token_ids for output in outputs]
        steps, tokens = sum(output.steps for output in outputs), sum(map(len, answers))
        heads = zip(*(output.accepted_per_head for output in outputs), strict=True)
        row = {"prompts": name, "temperature": temperature, "answers": len(answers)}
        row["tokens_per_step"] = round(tokens / steps, 4)
        row["accepted_per_head"] = [round(sum(head) / steps, 4) for head in heads]
        row["repetition"] = round(sum(map(repeated, answers)) / tokens, 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    (args.output / "report.json").write_text(json.dumps(rows, indent=2) + "\n")


def speculator_config(args: Namespace, target: ModelArgs) -> dict:
    """config.json of the speculator, as the published ones have it."""
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "base_model_name_or_path": args.base_model or args.checkpoint,
        "emb_dim": target.dim,
        "inner_dim": args.inner_dim or target.dim,
        "n_predict": args.n_predict,
        "vocab_size": target.vocab_size,
        "tie_weights": args.tie_weights,
        "scale_input": args.scale_input,
        "top_k_tokens_per_head": ([8, 4, 3] + [2] * args.n_predict)[: args.n_predict],
        "n_candidates": 5,
        "torch_dtype": "float16",
    }
    outside, rank = target.vocab_size - (args.draft_vocab_size or target.vocab_size), args.emb_rank
    rank = min(32, outside, target.dim) if rank is None else rank
    more = {"draft_vocab_size": args.draft_vocab_size, "emb_rank": rank or None}
    return config | {name: value for name, value in more.items() if value is not None}


def save_speculator(
    speculator: MLPSpeculator, config: dict, directory: Path, dtype: str = "float16"
) -> None:
    """config.json and the weights with the published names, tied tensors once. In int8 every
    matrix has a scale per row beside it, an addition to the format."""
    tensors = {f"speculator.{k}": p.detach() for k, p in speculator.named_parameters()}
    for name, weight in list(tensors.items()) if dtype == "int8" else ():
        if weight.dim() == 2:
            scale = weight.abs().amax(1).clamp(min=1e-8) / 127
            tensors[name] = (weight / scale[:, None]).round().char()
            tensors[f"{name}_scale"] = scale
    tensors = {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}
    if speculator.draft_ids is not None:
        tensors["draft_ids"] = speculator.draft_ids.int()
    save_torch_state_dict(tensors, directory, max_shard_size=SHARD)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def plot(directory: Path) -> None:
    """metrics.png: loss and held-out acceptance per head."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('train: no plot; pip install ".[plot]" brings matplotlib', file=sys.stderr)
        return
    rows = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accepted"), strict=True):
        heads = axes.plot([row["step"] for row in rows], [row[key] for row in rows])
        axes.set(xlabel="step", ylabel="loss" if key == "loss" else "held-out acceptance")
        axes.legend(heads, [f"head {i + 1}" for i in range(len(heads))])
    figure.savefig(directory / "metrics.png")


# --- command line ------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    add, flag = parser.add_argument, BooleanOptionalAction
    add("--checkpoint", required=True, help="target model: directory or hub id")
    add("--base-model", help="what config.json calls the target; unset: --checkpoint as given")
    add("--prompts", nargs="+", required=True, help='JSON lines of {"prompt"} or {"messages"}')
    add("--eval-prompts", nargs="+", help="measured too, beside every 50th of the prompts")
    add("--output", type=Path, required=True, help="directory; a started one is gone on with")
    add("--n-predict", type=int, default=4, help="heads (4)")
    add("--inner-dim", type=int, default=0, help="width; 0, the default: the target's")
    add("--tie-weights", action=flag, default=True, help="one set of weights for all heads")
    add("--scale-input", action=flag, default=True, help="normalise the target's hidden state")
    add("--draft-vocab-size", type=int, help="draft only so many, the most frequent, tokens")
    add("--emb-rank", type=int, help="in which undrafted tokens' embeddings differ; 0: not (32)")
    add("--own-prompts", type=int, default=2, help="that the target adds to each given one (2)")
    add("--max-new-tokens", type=int, default=256, help="tokens per answer (256)")
    add("--tokens", type=int, help="of text at most; unset: answer all prompts")
    add("--rows", type=int, help="answers written together; unset: as a GPU's memory allows, or 64")
    add("--steps", type=int, default=10000, help="training steps (10000)")
    add("--batch-size", type=int, default=8192, help="positions per step and GPU (8192)")
    add("--learning-rate", type=float, default=3e-3, help="its peak (0.003)")
    add("--save-dtype", default="float16", choices=["float16", "int8"], help="(float16)")
    add("--seed", type=int, default=0)
    add("--device", help="unset: cuda if there is one, else cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    counts = ("n_predict", "max_new_tokens", "tokens", "rows", "steps", "batch_size")
    for name, least in (("own_prompts", 0), *((name, 1) for name in counts)):
        if (value := getattr(args, name)) is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value} is out of range: at least {least}")
    for file in args.prompts:
        check_is_file(file)
    if not 0 < args.learning_rate < math.inf:
        raise ValueError(f"--learning-rate {args.learning_rate:g} is out of range: above 0")
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.rank = int(os.environ.get("RANK", 0))
    if args.world > 1 and not args.device and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        advice = "; lower --rows (text) or --batch-size (training)" if full else ""
        print(f"train: {one_line(error)}{advice}", file=sys.stderr)
        return 1
    return 0


# Settings on which the text does not depend.
SHAPE = ("n_predict", "inner_dim", "tie_weights", "scale_input", "draft_vocab_size", "emb_rank")
TRAINING = (*SHAPE, "steps", "batch_size", "learning_rate")


def keep_settings(args: Namespace, template: str) -> None:
    """settings.json: an output directory is gone on with under the same settings only, but for
    those of the training while there is no state.pt."""
    free = (
        "output",
        "eval_prompts",
        "prompts",
        "device",
        "rank",
        "rows",
        "base_model",
        "save_dtype",
    )
    settings = {name: value for name, value in vars(args).items() if name not in free}
    # Not the prompts as the template renders them: that may write the date.
    given = b"".join(Path(file).read_bytes() for file in args.prompts) + template.encode()
    settings["prompts"] = hashlib.sha256(given).hexdigest()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "settings.json"
    fixed = (args.output / "state.pt").exists()
    for name, before in read_json(file).items() if file.exists() else ():
        if before != (now := settings.get(name)) and (fixed or name not in TRAINING):
            begun = f"{args.output} was begun with {name} {before}, not {now}"
            again = ", or delete its state.pt to train anew on its text" if name in TRAINING else ""
            raise ValueError(f"{begun}; choose another --output{again}")
    if not args.rank:
        write_whole(file, json.dumps(settings, indent=2) + "\n")


def captured(step: Callable) -> Callable:
    """A decode step as one CUDA graph of just what it does: for a batch so wide a compiler gains
    little, and takes a minute. The first call does two steps: it is `Engine.warm_up`'s."""
    graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def replay(*args) -> None:
        if args not in graphs:
            step(*args)  # warm-up
            graphs[args] = torch.cuda.CUDAGraph()
            # NCCL's watchdog is another thread, and asks for events.
            with torch.cuda.graph(graphs[args], capture_error_mode="thread_local"):
                step(*args)
        graphs[args].replay()

    return replay


MOST_ROWS = 2048  # more were not tried


def rows_that_fit(target: Transformer, width: int) -> int:
    """Answers of `width` tokens to write at once: as many as half of a GPU's free memory holds."""
    weight = target.embed.weight
    if not weight.is_cuda:
        return 64
    row = math.prod(kv_cache_shape(target.args, 1, width)) * weight.dtype.itemsize
    return max(1, min(MOST_ROWS, torch.cuda.mem_get_info()[0] // (2 * row)))


def run(args: Namespace) -> None:
    llm = LLM(args.checkpoint, device=args.device, dtype=args.dtype, load=False)
    if llm.tokenizer is None or llm.tokenizer.chat_template is None:
        raise ValueError(f"{llm.directory}: no chat template; put a chat_template.jinja there")
    llm.max_seq_len = min(llm.max_seq_len, PROMPT_TOKENS + args.max_new_tokens)
    config = speculator_config(args, llm.args)
    speculator_args = SpeculatorArgs.from_config(config)
    prompts = read_prompts(llm, args.prompts, least=2)
    sets = {"held-out": prompts[::HELD_OUT]}
    sets |= {file: read_prompts(llm, [file]) for file in args.eval_prompts or ()}
    prompts = [prompt for i, prompt in enumerate(prompts) if i % HELD_OUT]
    if args.world > 1:
        dist.init_process_group("nccl" if llm.device.type == "cuda" else "gloo")
        if args.rank:
            dist.barrier()  # rank 0 writes the settings that the others read
    try:
        keep_settings(args, llm.tokenizer.chat_template)
    finally:
        if args.world > 1 and not args.rank:
            dist.barrier()

    target = load_model(llm.directory, llm.device, llm.dtype)
    width, compiled = llm.max_seq_len, llm.compiled
    rows = args.rows or rows_that_fit(target, width)
    engine = Engine(target, batch_size=rows, max_seq_len=width, compiled=compiled)
    if target.embed.weight.is_cuda:
        engine.compiled_step = captured(engine.decode_step)
    texts = training_text(llm, engine, prompts, sets, args)
    file = args.output / f"held-out-{args.rank}.jsonl"
    held_out = write_text(engine, asked(sets["held-out"], [0.0], args), file)
    print(f"train: {sum(len(answer) for _, answer in texts)} tokens of text", file=sys.stderr)
    if not any(len(answer) > 1 for _, answer in texts):  # of which the last one teaches nothing
        raise ValueError(f"process {args.rank} has no text to learn from; give more prompts")
    del engine  # with its cache and graphs
    gc.collect()
    torch.cuda.empty_cache()

    table = target.embed.weight.detach()
    speculator = new_speculator(speculator_args, texts, args.seed, llm.device, table)
    losses = HeadLosses(speculator, target.output.weight.detach())
    train(args, target, losses, texts, hidden_states(target, held_out))
    if args.rank == 0:
        save_speculator(speculator, config, args.output, args.save_dtype)
        plot(args.output)
        report(args, llm, target, sets)
    if args.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
