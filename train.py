"""Train an MLP speculator for a target model, in the format of the published accelerators.

    python train.py --checkpoint TARGET --prompts FILE.jsonl ... --output DIR

Reads downward: prompts, text (the target answers them itself), hidden states, loss, training,
evaluation, files, the command line. What is done is kept in DIR: the same command goes on where an
interrupted one stopped.

Letters in shape comments:
    B sequences    C tokens of a padded sequence    M positions    n heads    D, W, V as elsewhere
"""

import argparse
import gc
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastspec import (
    LLM,
    Engine,
    Request,
    SamplingParams,
    check_messages,
    decode_loop,
    local_checkpoint,
    one_line,
)
from model import ModelArgs, Transformer, kv_cache_shape, load_model, read_json
from speculator import MLPSpeculator, SpeculatorArgs, load_speculator

# --- prompts -----------------------------------------------------------------------------------

HELD_OUT = 50  # every 50th prompt is for evaluation only
MAX_PROMPT = 512  # tokens; longer ones are left out
FORWARD_TOKENS = 32768  # that the frozen target computes together
TEMPERATURES = (0.8, 1.0)  # in turn, of a prompt's answers after the first, which is greedy
OWN_TOKENS = 96  # of a prompt that the target writes; a longer one is dropped
COMPLETE = "Complete the following code.\n\n"


def read_prompts(files: list[str]) -> list[list[dict]]:
    """Conversations from JSON lines {"prompt": text} or {"messages": [...]}, each once."""
    found: dict[str, list[dict]] = {}
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    messages = read_prompt(line, f"{file}:{number}")
                    found.setdefault(json.dumps(messages), messages)
    if len(found) < 2:
        raise ValueError(f"{', '.join(files)}: {len(found)} prompts; at least 2 are needed")
    prompts = list(found.values())
    random.Random(0).shuffle(prompts)
    return prompts


def read_prompt(line: str, where: str) -> list[dict]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{where}: expected an object with either "prompt" or "messages"')
    if "prompt" in row:
        row = {"messages": [{"role": "user", "content": row["prompt"]}]}
    check_messages(row["messages"], where)
    return row["messages"]


# --- text --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One answer of the target, with the prompt it follows."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def write_text(llm: LLM, requests: list[Request], file: Path, most: float = math.inf) -> list[Text]:
    """Let the target answer all requests, until there are `most` tokens; what `file` holds of
    them from an earlier run is not done again."""
    done = read_text(file, len(requests))
    total = sum(map(len, done.values()))
    todo = [i for i in range(len(requests)) if i not in done]

    def taken() -> Iterator[Request]:
        for i in todo:
            if total >= most:
                return
            running.append([])
            yield requests[i]

    needs = (True, False)  # greedy requests, too: one compiled step writes all of the text
    running: list[list[int]] = []
    bar = tqdm(total=len(requests), initial=len(done), desc=file.stem, unit="row", disable=None)
    with open(file, "a") as out:
        steps = decode_loop(llm.engine, taken(), needs) if todo else ()  # else nothing to compile
        for progress in steps:
            answer = running[progress.request]
            answer += progress.tokens
            if progress.done:
                number = todo[progress.request]
                out.write(json.dumps([number, answer]) + "\n")
                done[number] = answer
                total += len(answer)
                bar.update()
    bar.close()
    return [Text(requests[i].prompt, done[i]) for i in sorted(done)]


def read_text(file: Path, count: int) -> dict[int, list[int]]:
    """Answers by request number; a line that an interrupted run left half written is cut off."""
    done, good = {}, 0
    if file.exists():
        with open(file, "rb+") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                number, answer = json.loads(line)
                done[number] = answer
                good += len(line)
            lines.truncate(good)
    if done and max(done) >= count:
        raise ValueError(f"{file}: was written for other prompts; choose another --output")
    return done


def make_requests(
    llm: LLM, prompts: list, args: argparse.Namespace, temperatures: Sequence[float]
) -> list[Request]:
    """A request per prompt and temperature; long prompts are left out."""
    requests = []
    for i, messages in enumerate(prompts):
        ids = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(messages), False)
        for j, temperature in enumerate(temperatures if len(ids) <= MAX_PROMPT else ()):
            params = SamplingParams(
                temperature=temperature,
                max_tokens=args.max_new_tokens,
                seed=args.seed + i * len(temperatures) + j,
            )
            requests.append(llm.request(ids, params, f"prompt {i}"))
    if prompts and not requests:
        raise ValueError(f"every prompt has more than {MAX_PROMPT} tokens")
    return requests


def user_turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def own_requests(llm: LLM, args: argparse.Namespace) -> list[Request]:
    """What lets the target write prompts: the chat template up to where a user's text begins."""
    mark = "the user's text"
    opening, found, _ = llm.tokenizer.apply_chat_template(user_turn(mark)).partition(mark)
    if args.own_prompts and not found:
        raise ValueError("--own-prompts: the chat template does not show the user's text as it is")
    ids = llm.tokenizer.encode(opening, False)
    seeds = range(args.seed, args.seed + args.own_prompts)[args.rank :: args.world]
    params = [SamplingParams(temperature=1.0, max_tokens=OWN_TOKENS, seed=seed) for seed in seeds]
    return [llm.request(ids, p, "the opening of a chat") for p in params]


def own_prompts(llm: LLM, texts: list[Text]) -> list[list[dict]]:
    """The prompts that came out, each once."""
    ended = [text.answer[:-1] for text in texts if text.answer[-1] in llm.end_ids]
    written = dict.fromkeys(llm.tokenizer.decode(ids).strip() for ids in ended)
    return [user_turn(text) for text in written if text]


def code_prompts(llm: LLM, texts: list[Text]) -> list[list[dict]]:
    """The first half of the first code block of each of these answers, to be completed."""
    found = {}
    for text in texts:
        _, fence, code = llm.tokenizer.decode(text.answer).partition("```")
        lines = code.partition("```")[0].splitlines()[1:]  # the first line names the language
        if fence and len(lines) >= 4:
            found["\n".join(lines[: len(lines) // 2])] = None
    return [user_turn(COMPLETE + half) for half in found]


def training_text(
    llm: LLM, given: list[Request], own: list[Request], args: argparse.Namespace
) -> list[Text]:
    """Answers to the given prompts, then, half greedily, to those that the target supplies: these
    are met once each, so that there is new greedy text however much is asked for."""

    def write(name: str, requests: list[Request], most: float = math.inf) -> list[Text]:
        file = args.output / f"{name}-{args.rank}-of-{args.world}.jsonl"
        return write_text(llm, requests, file, most)

    most = (args.tokens or math.inf) / args.world
    texts = write("text", given, most)
    if own:
        prompts = own_prompts(llm, write("own-prompts", own)) + code_prompts(llm, texts)
        random.Random(args.seed).shuffle(prompts)
        requests = make_requests(llm, prompts[::2], args, [0.0])
        requests += make_requests(llm, prompts[1::2], args, [TEMPERATURES[0]])
        random.Random(args.seed).shuffle(requests)
        texts += write("own-text", requests, most - sum(len(text.answer) for text in texts))
    return texts


# --- hidden states -----------------------------------------------------------------------------


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


@torch.no_grad()
def hidden_states(target: Transformer, texts: list[Text]) -> States:
    """Run the frozen target over these texts, FORWARD_TOKENS at a time."""
    device = target.embed.weight.device
    todo = sorted(texts, key=lambda text: -len(text))  # little padding
    sizes = torch.tensor([len(text.answer) for text in todo], device=device)
    end = sizes.cumsum(0).repeat_interleave(sizes)
    # Filled in place: parts that are joined at the end would take twice the memory.
    states, at = (
        States(target.embed.weight.new_empty(len(end), target.args.dim), end.clone(), end),
        0,
    )
    while todo:
        C = len(todo[0])
        batch, todo = todo[: (rows := max(1, FORWARD_TOKENS // C))], todo[rows:]
        tokens = torch.tensor([t.ids + [0] * (C - len(t)) for t in batch]).to(device)  # [B C]
        kv = target.embed.weight.new_zeros(kv_cache_shape(target.args, len(batch), 0))
        positions = torch.arange(C, device=device).expand(len(batch), -1)
        causal = torch.ones(C, C, dtype=torch.bool, device=device).tril()
        hidden, _ = target(tokens, positions, kv, torch.zeros_like(positions[:, 0]), causal)
        first, stop = torch.tensor([[len(t.prompt), len(t)] for t in batch]).to(device).T
        chosen = (positions >= first[:, None]) & (positions < stop[:, None])  # answer tokens
        there = slice(at, at := at + sum(len(t.answer) for t in batch))
        states.hidden[there], states.token[there] = hidden[:, :-1][chosen[:, 1:]], tokens[chosen]
    return states


# --- loss --------------------------------------------------------------------------------------

LATER_HEADS = 0.7  # weight of a head beside the one before: it counts only where that was right


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy [M] of logits [M, V] against the distribution of the teacher's [M, V]."""
    return -(teacher.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)


class HeadLosses(nn.Module):
    """Cross-entropy of every head against the target's own distribution at its position."""

    def __init__(self, speculator: MLPSpeculator, output: Tensor):
        super().__init__()
        self.speculator = speculator
        ids = speculator.draft_ids
        self.register_buffer("output", output if ids is None else output[ids])  # [V or drafted, D]
        self.cross_entropy = soft_cross_entropy
        if output.is_cuda:
            self.cross_entropy = torch.compile(soft_cross_entropy)

    def forward(self, state: Tensor, tokens: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
        """Mean loss [n] of the heads; see States.examples for the arguments."""
        losses = []
        state = self.speculator.start(state)
        for i in range(inside.shape[1]):
            state, logits = self.speculator.step(i, state, tokens[:, i])
            with torch.no_grad():
                wanted = F.linear(teacher[:, i], self.output)
            loss = self.cross_entropy(logits, wanted) * inside[:, i]
            losses.append(loss.sum() / inside[:, i].sum().clamp(min=1))
        return torch.stack(losses)


@torch.no_grad()
def acceptance(speculator: MLPSpeculator, states: States) -> list[float]:
    """How often head i and those before it are right, drafting greedily at every position."""
    n, right = speculator.args.n_predict, []
    for at in torch.arange(len(states.token), device=states.token.device).split(4096):
        state, tokens, _, inside = states.examples(at, n)
        drafts = speculator.draft(state.float(), tokens[:, 0], at, n)  # [m n]
        right.append(((drafts == tokens[:, 1:]) & inside).long().cumprod(1))
    return torch.cat(right).float().mean(0).tolist()


# --- training ----------------------------------------------------------------------------------


def new_speculator(args: SpeculatorArgs, texts: list[Text], seed: int, device) -> MLPSpeculator:
    """Random weights as in IBM's trainer; a draft vocabulary is the most frequent tokens."""
    torch.manual_seed(seed)
    speculator = MLPSpeculator(args)
    for name, param in speculator.named_parameters():
        if not name.startswith("ln."):
            nn.init.normal_(param, std=args.inner_dim**-0.5)
    if args.draft_vocab_size:
        tokens = torch.tensor([token for text in texts for token in text.answer])
        counts = tokens.bincount(minlength=args.vocab_size)
        ids = counts.argsort(descending=True, stable=True)[: args.draft_vocab_size]
        speculator.set_draft_ids(ids.sort().values)
    return speculator.to(device)


def blocks_of(texts: list[Text], most: int) -> list[list[Text]]:
    """Texts in blocks whose hidden states fit into memory: at most `most` positions each."""
    blocks, room = [], 0
    for text in texts:
        if len(text.answer) > room:
            blocks, room = [*blocks, []], most
        blocks[-1].append(text)
        room -= len(text.answer)
    return blocks


def schedule(counts: list[int], size: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(block, batch) of every step: each epoch goes through all blocks, of `counts` examples, each
    shuffled and cut into batches of `size`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for block, count in enumerate(counts):
            order = torch.randperm(count, generator=generator)
            for batch in order.split(size)[: max(1, count // size)]:
                yield block, batch


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 2 %, then a cosine to 5 % of the peak."""
    warm = max(1, steps // 50)
    return peak * min((step + 1) / warm, 0.525 + 0.475 * math.cos(math.pi * step / steps))


LOG_EVERY = 500


def train(
    args: argparse.Namespace,
    target: Transformer,
    losses: HeadLosses,
    texts: list[Text],
    held_out: States,
) -> None:
    """Optimise the speculator of `losses`; `args.output` gets metrics.jsonl and state.pt."""
    speculator, device = losses.speculator, held_out.hidden.device
    model = losses if args.world == 1 else DistributedDataParallel(losses, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(
        speculator.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    start, n = load_state(args, speculator, optimizer), speculator.args.n_predict
    weight = LATER_HEADS ** torch.arange(n, device=device)
    blocks, loaded = blocks_of(texts, block_size(target)), None
    counts = [sum(len(text.answer) - 1 for text in block) for block in blocks]
    plan = schedule(counts, args.batch_size, args.seed + args.rank)
    bar = tqdm(total=args.steps, initial=start, desc="training", disable=args.rank > 0 or None)
    clock = time.perf_counter()
    for step, (block, batch) in zip(range(args.steps), plan, strict=False):
        if step < start:
            continue
        if block != loaded:
            states = None  # frees the block before
            states, loaded = hidden_states(target, blocks[block]), block
            index = torch.arange(len(states.end), device=device)
            starts = index[index + 1 < states.end]  # a last token has none to draft after it
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(*states.examples(starts[batch.to(device)], n))
        (loss * weight).sum().backward()
        nn.utils.clip_grad_norm_(speculator.parameters(), 1.0)
        optimizer.step()
        bar.update()
        if args.rank == 0 and ((step + 1) % LOG_EVERY == 0 or step + 1 == args.steps):
            found = loss.tolist()  # waits for the device
            if not math.isfinite(sum(found)):
                raise ValueError(f"the loss is {found} at step {step + 1}; lower --learning-rate")
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            speed = round((step % LOG_EVERY + 1) * args.batch_size * args.world / seconds)
            bar.set_postfix_str(f"loss {sum(found):.3f}, {speed} tokens/s")
            row = {"step": step + 1, "loss": found, "tokens_per_s": speed}
            row["accepted"] = acceptance(speculator, held_out)
            with open(args.output / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            save_state(args, speculator, optimizer, step + 1)
    bar.close()


def block_size(target: Transformer) -> int:
    """Positions whose hidden states take 60 % of the free GPU memory (more than one block is
    computed again in every epoch), or 2 GB on a CPU."""
    weight = target.embed.weight
    room = torch.cuda.mem_get_info(weight.device)[0] * 0.6 if weight.is_cuda else 2e9
    return int(room / (target.args.dim * weight.dtype.itemsize + 32))  # and four integers


def save_state(args: argparse.Namespace, speculator, optimizer, step: int) -> None:
    state = {"step": step, "speculator": speculator.state_dict()}
    state["optimizer"] = optimizer.state_dict()
    torch.save(state, args.output / "state.pt.tmp")
    os.replace(args.output / "state.pt.tmp", args.output / "state.pt")  # whole, or the one before


def load_state(args: argparse.Namespace, speculator, optimizer) -> int:
    """The step to go on from: 0 in a new directory."""
    if not (file := args.output / "state.pt").exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    speculator.load_state_dict(state["speculator"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# --- evaluation --------------------------------------------------------------------------------


def evaluate(target: Transformer, speculator: MLPSpeculator, requests: list[Request]) -> dict:
    """Real speculative decoding of these requests: tokens per step and acceptance per head."""
    longest = max(r.params.max_tokens + len(r.prompt) for r in requests)
    engine = Engine(
        target,
        speculator,
        batch_size=min(len(requests), 128),
        max_seq_len=longest,
        num_draft_tokens=speculator.args.n_predict,
    )
    steps, accepted, answers = 0, [0] * engine.k, [[] for _ in requests]
    for progress in decode_loop(engine, requests):
        steps += 1
        answers[progress.request] += progress.tokens
        for head in range(progress.accepted):
            accepted[head] += 1
    return {
        "answers": len(answers),
        "tokens_per_step": sum(map(len, answers)) / steps,
        "accepted_per_head": [count / steps for count in accepted],
        "repetition": sum(map(repeated, answers)) / max(1, sum(map(len, answers))),
    }


def repeated(answer: list[int], n: int = 8) -> int:
    """Tokens that end an n-gram which the answer held before: loops raise acceptance."""
    grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
    return len(grams) - len(set(grams))


# --- files -------------------------------------------------------------------------------------


SHARD = 2**24 - 2**14  # bytes of tensors in a file: with its header it stays below 16 MiB


def speculator_config(args: argparse.Namespace, target: ModelArgs) -> dict:
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
        "top_k_tokens_per_head": ([4, 3] + [2] * args.n_predict)[: args.n_predict],
        "n_candidates": 5,
        "torch_dtype": "float16",
    }
    return config | ({"draft_vocab_size": n} if (n := args.draft_vocab_size) is not None else {})


def save_speculator(speculator: MLPSpeculator, config: dict, directory: Path) -> None:
    """config.json and the weights with the published names, tied tensors once, in files of at most
    SHARD bytes where no tensor is larger."""
    tensors = {f"speculator.{k}": p.detach().half() for k, p in speculator.named_parameters()}
    if speculator.draft_ids is not None:
        tensors["draft_ids"] = speculator.draft_ids.int()
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.nbytes
        if size > room:
            shards, room = [*shards, {}], SHARD
        shards[-1][name] = tensor.cpu().contiguous()
        room -= size
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    index = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        save_file(shard, directory / f"model{part}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(shard, f"model{part}.safetensors")
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        text = json.dumps({"metadata": total, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(text + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def plot(directory: Path) -> None:
    """metrics.png: loss and held-out acceptance per head."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('train: no plot; pip install ".[plot]" brings matplotlib', file=sys.stderr)
        return
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accepted"), strict=True):
        for head, values in enumerate(zip(*(row[key] for row in rows), strict=True)):
            axes.plot([row["step"] for row in rows], values, label=f"head {head + 1}")
        axes.set(xlabel="step", ylabel=key, title={"accepted": "held-out acceptance"}.get(key, key))
        axes.legend()
    figure.savefig(directory / "metrics.png")


# --- command line ------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
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
    add("--answers", type=int, default=2, help="per prompt: greedy, T = 0.8, 1, 0.8, ... (2)")
    add("--own-prompts", type=int, default=0, help="that the target writes and answers, too (0)")
    add("--max-new-tokens", type=int, default=256, help="tokens per answer (256)")
    add("--tokens", type=int, help="stop writing text there; unset: all prompts are answered")
    add("--rows", type=int, default=64, help="answers written together (64)")
    add("--steps", type=int, default=10000, help="training steps (10000)")
    add("--batch-size", type=int, default=8192, help="positions per step and GPU (8192)")
    add("--learning-rate", type=float, default=3e-3, help="its peak (0.003)")
    add("--seed", type=int, default=0)
    add("--device", help="unset: cuda if there is one, else cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.rank = int(os.environ.get("RANK", 0))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("train: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        advice = "lower --rows (text) or --batch-size (training); what is done is kept"
        print(f"train: {one_line(error)}: {advice}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"train: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    check_options(args)
    prompts = read_prompts(args.prompts)
    sets = {"held-out": prompts[::HELD_OUT]}
    prompts = [messages for i, messages in enumerate(prompts) if i % HELD_OUT]
    if args.eval_prompts:
        sets |= {Path(file).stem: read_prompts([file]) for file in args.eval_prompts}
    directory = local_checkpoint(args.checkpoint)
    target_args = ModelArgs.from_config(read_json(directory / "config.json"))
    config = speculator_config(args, target_args)
    speculator_args = SpeculatorArgs.from_config(config)
    if args.world > 1 and not args.device and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    llm = LLM(
        directory,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.rows,
        max_seq_len=min(target_args.max_position, MAX_PROMPT + args.max_new_tokens),
        load=False,
    )
    if llm.tokenizer is None or llm.tokenizer.chat_template is None:
        raise ValueError(f"{directory}: no chat template; put a chat_template.jinja there")
    temperatures = [0.0, *(TEMPERATURES[j % 2] for j in range(args.answers - 1))]
    given = make_requests(llm, prompts, args, temperatures)[args.rank :: args.world]
    own = own_requests(llm, args)
    held_out = make_requests(llm, sets["held-out"], args, [0.0])
    keep_settings(args, prompts)
    if args.world > 1:
        torch.distributed.init_process_group("nccl" if llm.device.type == "cuda" else "gloo")
    llm.load()
    texts = training_text(llm, given, own, args)
    held_out_texts = write_text(llm, held_out, args.output / f"held-out-{args.rank}.jsonl")
    print(f"train: {sum(len(t.answer) for t in texts)} tokens of text", file=sys.stderr)

    del llm.engine  # with its cache and graphs
    torch._dynamo.reset()
    gc.collect()
    target = load_model(directory, llm.device, llm.dtype)
    speculator = new_speculator(speculator_args, texts, args.seed, llm.device)
    losses = HeadLosses(speculator, target.output.weight.detach())
    train(args, target, losses, texts, hidden_states(target, held_out_texts))
    if args.rank == 0:
        save_speculator(speculator, config, args.output)
        plot(args.output)
        report(args, llm, target, sets)
    if args.world > 1:
        torch.distributed.destroy_process_group()


def check_options(args: argparse.Namespace) -> None:
    least_one = ("n_predict", "answers", "max_new_tokens", "rows", "steps", "batch_size")
    for name in (*least_one, "own_prompts", "inner_dim", "seed", "learning_rate"):
        value, least = getattr(args, name), int(name in least_one)
        if value < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {value} is out of range: at least {least}")


def keep_settings(args: argparse.Namespace, prompts: list) -> None:
    """settings.json: an output directory is gone on with under the same settings only."""
    file = args.output / "settings.json"
    free = ("output", "eval_prompts", "prompts", "device", "rank", "world", "rows", "base_model")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    args.output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2) + "\n")
    for name, before in read_json(file).items():
        if before != settings[name]:
            raise ValueError(
                f"{args.output} was begun with {name} {before}, not {settings[name]}; "
                "choose another --output"
            )


def report(args: argparse.Namespace, llm: LLM, target: Transformer, sets: dict) -> None:
    """Measure the written speculator; report.json and a table."""
    speculator = load_speculator(args.output, llm.device, llm.dtype)
    rows = []
    print("prompts          T  answers  tokens per step  repetition  accepted per head")
    for name, prompts in sets.items():
        for temperature in (0.0, 1.0):
            requests = make_requests(llm, prompts, args, [temperature])
            row = evaluate(target, speculator, requests)
            rows.append({"prompts": name, "temperature": temperature} | row)
            heads = "  ".join(f"{share:.3f}" for share in row["accepted_per_head"])
            print(
                f"{name:<15}{temperature:3.0f}{row['answers']:9}{row['tokens_per_step']:17.3f}"
                f"{row['repetition']:12.3f}  {heads}",
                flush=True,
            )
    (args.output / "report.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
