"""train.py: what the heads learn, that runs go on and repeat, that the result can be read."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import END, STORY, TEMPLATE, run_main, save_story, story_ids, tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tokenizer
import train
from fastspec import LLM, Request, SamplingParams
from model import load_model
from speculator import MLPSpeculator, SpeculatorArgs, load_speculator
from train import HeadLosses, States

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The model that tells its STORY after any prompt, with a chat template."""
    directory = tmp_path_factory.mktemp("target")
    save_story(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f" {a} {b}"} for a in WORDS for b in WORDS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


SMALL = {
    "steps": 40,
    "batch-size": 64,
    "inner-dim": 16,
    "n-predict": 3,
    "rows": 16,
    "own-prompts": 0,
}


def run(target, prompts, output, *more, **options):
    """Exit code of a run with small settings."""
    argv = ["--checkpoint", target, "--prompts", prompts, "--output", output, *more]
    for name, value in (SMALL | {k.replace("_", "-"): v for k, v in options.items()}).items():
        argv += [f"--{name}", value]
    return train.main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def trained(target, prompts, tmp_path_factory):
    """A finished run of the story's speculator."""
    output = tmp_path_factory.mktemp("trained") / "out"
    assert run(target, prompts, output, steps=250, batch_size=256, inner_dim=32) == 0
    return output


# ---- what is learnt ----


def test_a_deterministic_pattern_is_learnt_to_full_acceptance(trained):
    """21 tokens with three drafts a step: six steps where all of them are right."""
    greedy, sampled = json.loads((trained / "report.json").read_text())
    assert (greedy["temperature"], sampled["temperature"]) == (0, 1)
    assert greedy["tokens_per_step"] == sampled["tokens_per_step"] == 21 / 6
    assert greedy["answers"] == 2 and greedy["repetition"] == 0
    *_, last = read_lines(trained / "metrics.jsonl")
    # Of a text's 21 positions the last has no token to draft, the last two no second one.
    assert last["accepted"] == pytest.approx([20 / 21, 19 / 21, 18 / 21])
    assert last["tokens_per_step"] == 21 / 6


def test_the_speculator_of_a_run_decodes_through_the_command_line(trained, target, capsys):
    """By itself: its config names the target. The text is the target's own."""
    argv = ["--speculator", trained, "--prompt", "Q", "--max-new-tokens", 60]
    code, out, err = run_main(capsys, *argv)
    assert (code, out) == (0, STORY + "\n")
    assert "tokens per step      3.50" in err


def shifted(offset: int, n: int = 400, vocab: int = 24):
    """States of random texts in which every state tells its own choice and, `offset` tokens
    later, one more; the output layer reads the first."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(vocab, (n * 10,), generator=generator)
    told = token.roll(-offset)
    hidden = torch.cat([torch.eye(vocab)[token] * 30, torch.eye(vocab)[told]], dim=1)
    end = (torch.arange(n * 10) // 10 + 1) * 10
    output = torch.cat([torch.eye(vocab), torch.zeros(vocab, vocab)], dim=1)
    return States(hidden, token, end), output


@pytest.mark.parametrize(("offset", "solvable"), [(1, True), (0, False), (2, False)])
def test_only_the_right_alignment_solves_it(tmp_path, monkeypatch, offset, solvable):
    """Texts are random: head 0 can only know a token that its own state tells, which is the one
    after the token that the state chose. A state's own choice or the token two on does not help."""
    states, output = shifted(offset)
    speculator = train.new_speculator(SpeculatorArgs(48, 32, 1, 24), [], 0, "cpu")
    accepted = accepted_after_training(speculator, states, output, tmp_path, monkeypatch)
    assert accepted > 0.85 if solvable else accepted < 0.4  # 9 of 10 positions have a next token


def accepted_after_training(speculator, states, output, tmp_path, monkeypatch):
    """Of the only head, trained on these states of texts of 10 tokens."""
    monkeypatch.setattr(train, "hidden_states", lambda *_: states)
    texts = [([0], token.tolist()) for token in states.token.split(10)]
    weight = torch.zeros(24, 48)
    stub = SimpleNamespace(embed=SimpleNamespace(weight=weight), args=SimpleNamespace(dim=48))
    options = SimpleNamespace(
        output=tmp_path, steps=150, batch_size=512, seed=0, learning_rate=0.01, world=1, rank=0
    )
    train.train(options, stub, HeadLosses(speculator, output), texts, states)
    (accepted,) = train.acceptance(speculator, states)["accepted"]
    return accepted


@pytest.mark.parametrize(("rank", "least", "most"), [(None, 0, 0.1), (8, 0.4, 0.5)])
def test_a_rank_tells_tokens_outside_the_draft_vocabulary_apart(
    tmp_path, monkeypatch, rank, least, most
):
    """Every second token is outside it, and alone decides the next one, t - 12: states say no more
    than that some such token was chosen. Without a rank a guess is right once in 12 times."""
    generator = torch.Generator().manual_seed(0)
    outside = torch.randint(12, 24, (2000,), generator=generator)
    token = torch.stack((outside, outside - 12), dim=1).flatten()
    hidden = torch.eye(48)[torch.where(token < 12, token, 40)] * 30
    states = States(hidden, token, (torch.arange(4000) // 10 + 1) * 10)
    args = SpeculatorArgs(48, 32, 1, 24, draft_vocab_size=12, emb_rank=rank)
    table = torch.randn(24, 48, generator=generator)
    speculator = train.new_speculator(args, [([0], list(range(12)))], 0, "cpu", table)
    output = torch.eye(24, 48)
    accepted = accepted_after_training(speculator, states, output, tmp_path, monkeypatch)
    assert least <= accepted <= most


def test_hidden_states_are_those_of_each_text_alone(tmp_path, monkeypatch):
    """Ragged texts, in batches of a few; in float32 the padding moves the last bits only."""
    monkeypatch.setattr(train, "FORWARD_TOKENS", 60)
    oracle = tiny_llama(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(97, (n,), generator=generator).tolist() for n in (9, 30, 4, 17, 2)]
    texts = [(x[: len(x) // 2], x[len(x) // 2 :]) for x in ids]
    states = train.hidden_states(load_model(tmp_path), texts)
    start, found = 0, []
    for stop in sorted(set(states.end.tolist())):
        assert states.end[start:stop].tolist() == [stop] * (stop - start)
        ((prompt, answer),) = [t for t in texts if t[1] == states.token[start:stop].tolist()]
        with torch.no_grad():
            hidden = oracle.model(torch.tensor([prompt + answer])).last_hidden_state[0]
        expected = hidden[len(prompt) - 1 : -1]
        torch.testing.assert_close(states.hidden[start:stop], expected, rtol=1e-4, atol=1e-4)
        found.append(answer)
        start = stop
    assert start == len(states.token) and len(found) == len(texts)


# ---- runs that stop and go on ----


def stop_at(monkeypatch, step):
    """Make the run stop, as by Ctrl-C, before it computes this step's loss."""
    forward, calls = HeadLosses.forward, []

    def failing(*args):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(HeadLosses, "forward", failing)


@pytest.fixture(scope="module")
def whole(target, prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert run(target, prompts, output) == 0
    return output


def test_a_seed_repeats_the_run(target, prompts, whole, tmp_path):
    assert run(target, prompts, tmp_path / "again") == 0
    assert run(target, prompts, tmp_path / "other", seed=1) == 0
    again, other = (tmp_path / name / "model.safetensors" for name in ("again", "other"))
    assert again.read_bytes() == (whole / "model.safetensors").read_bytes() != other.read_bytes()


@pytest.mark.parametrize(("step", "seconds"), [(1, 0), (5, 0), (11, 0), (40, 0), (38, 60)])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    target, prompts, whole, tmp_path, monkeypatch, step, seconds, capsys
):
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(target, prompts, tmp_path) == 130
    assert (
        capsys.readouterr().err.splitlines()[-1] == "train: interrupted; the same command goes on"
    )
    if seconds or step == 1:
        assert not (tmp_path / "state.pt").exists()
    else:
        assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == step - 1
    assert run(target, prompts, tmp_path) == 0
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    steps = [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == [10, 20, 30, 40]


def test_a_rank_goes_on_to_the_same_weights(target, prompts, tmp_path, monkeypatch, capsys):
    """It comes with a draft vocabulary, unless it is 0."""
    whole, cut, off = (tmp_path / name for name in ("whole", "cut", "off"))
    assert run(target, prompts, whole, draft_vocab_size=60) == 0
    assert json.loads((whole / "config.json").read_text())["emb_rank"] == 32
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        stop_at(patch, 29)
        assert run(target, prompts, cut, draft_vocab_size=60) == 130
    assert run(target, prompts, cut, draft_vocab_size=60, emb_rank=31) == 1
    assert "was begun with emb_rank None, not 31; choose another --output" in last_line(capsys)
    assert run(target, prompts, cut, draft_vocab_size=60) == 0
    name = "model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert run(target, prompts, off, draft_vocab_size=60, emb_rank=0, steps=1) == 0
    assert "emb_rank" not in json.loads((off / "config.json").read_text())


def test_text_that_is_there_is_not_written_again(target, prompts, whole, tmp_path, monkeypatch):
    """Half of the answers and a line that was cut off: the rest is computed, to the same text."""
    settings, text = whole / "settings.json", whole / "text-0-of-1.jsonl"
    (tmp_path / settings.name).write_bytes(settings.read_bytes())
    lines = text.read_text().splitlines(keepends=True)
    (tmp_path / text.name).write_text("".join(lines[:49]) + lines[49][:-4])
    begun, loop = [], train.decode_loop

    def counting(engine, requests, *needs):
        if needs:  # text is written, not the speculator measured
            requests = (begun.append(1) or request for request in requests)
        return loop(engine, requests, *needs)

    monkeypatch.setattr(train, "decode_loop", counting)
    assert run(target, prompts, tmp_path) == 0
    # 98 of 100 prompts are trained on, with two answers, the 2 held out are answered once.
    assert len(begun) == (2 * 98 - 49) + 2
    assert sorted((tmp_path / text.name).read_text().splitlines()) == sorted(map(str.rstrip, lines))
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_text_stops_at_the_tokens_asked_for(target, prompts, tmp_path, monkeypatch):
    """What was begun is finished: up to one answer of 21 tokens more per row. Once it is there,
    nothing is compiled to write none."""
    assert run(target, prompts, tmp_path, tokens=500, steps=1) == 0
    answers = [row[1] for row in read_lines(tmp_path / "text-0-of-1.jsonl")]
    assert 500 <= sum(map(len, answers)) < 500 + 17 * 21
    monkeypatch.setattr(train, "decode_loop", None)
    assert run(target, prompts, tmp_path, tokens=500, steps=1) == 0


@pytest.mark.parametrize("answers", [3, 20, 33])
def test_text_that_was_interrupted_is_the_same(target, prompts, tmp_path, monkeypatch, answers):
    """With a limit, too: the first answers that reach it, not those that were done first."""
    settings = {"tokens": 500, "max_new_tokens": 60}
    whole, cut, loop = tmp_path / "whole", tmp_path / "cut", train.decode_loop
    assert run(target, prompts, whole, **settings) == 0

    def stopping(*args):
        done = 0
        for progress in loop(*args):
            yield progress
            if (done := done + progress.done) == answers:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "decode_loop", stopping)
        assert run(target, prompts, cut, **settings) == 130
    assert len(read_lines(cut / "text-0-of-1.jsonl")) == answers
    assert run(target, prompts, cut, **settings) == 0
    name = "model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_code_is_cut_at_some_line():
    """A block of four lines: one, two and three of them, each after one of the instructions."""
    answers = {1: "So:\n```python\na\nb\nc\nd\n```\nand", 2: "no code", 3: "```x\none\n```"}
    llm = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: answers[ids[0]]))
    texts = [([0], [i]) for i in (1, 2, 3, *[1] * 60)]
    found = list(train.code_to_complete(llm, texts))
    assert len(found) == 3 * 61
    # 183 of 12 equally likely ones: they hardly ever miss one.
    halves = ("a", "a\nb", "a\nb\nc")
    assert set(found) == {f"{words}\n\n{half}" for words in train.COMPLETE for half in halves}


def test_code_in_the_answers_is_given_to_complete(target, prompts, tmp_path, monkeypatch):
    """Two beginnings of code, one answered greedily, one sampled: trained on beside the rest, and
    a second run adds nothing."""
    trained, batches = [], train.batches
    code = ["Finish this program:\n\nfoo", "Write the rest:\n\nbar"]
    monkeypatch.setattr(train, "code_to_complete", lambda llm, texts: code[: len(texts) // 98])
    monkeypatch.setattr(train, "batches", lambda *a: trained.append(len(a[1])) or batches(*a))
    assert run(target, prompts, tmp_path, steps=1) == 0
    text = tmp_path / "code-0-of-1.jsonl"
    assert sorted(read_lines(text)) == [[i, [*story_ids(target), END]] for i in (0, 1)]
    before = text.read_bytes()
    assert run(target, prompts, tmp_path, steps=1) == 0
    assert text.read_bytes() == before and trained == [198, 198]


def test_the_target_writes_prompts_of_its_own(target, prompts, tmp_path):
    """One to each given prompt, from the first one or two words of it on (all that a prompt here
    has); equal ones count once. This target goes on with its story from any word of it."""
    assert run(target, prompts, tmp_path, steps=1, own_prompts=1) == 0
    file = tmp_path / "own-prompts-0-of-1.jsonl"
    own = [row["prompt"] for row in read_lines(file)]
    assert len(own) == 98 and all(text.endswith(" ten") for text in own)
    starts = {" ".join(text.split()[:2]) for text in own}
    given = {row["prompt"].strip() for row in read_lines(prompts)}
    # Two words of a given prompt, or one and what follows it in the story.
    assert len(starts & given) > 30
    assert starts <= {"ten", *given} | {f"{a} {b}" for a, b in itertools.pairwise(STORY.split())}
    answers = read_lines(tmp_path / "own-0-of-1.jsonl")
    assert len(answers) == len(train.read_prompts(LLM(target, load=False), [file]))


def test_no_prompt_of_its_own_is_like_an_evaluation_prompt(tmp_path):
    llm = SimpleNamespace(
        tokenizer=SimpleNamespace(chat_template=""),
        chat_request=lambda turns, *_: Request([len(turns[0]["content"])], None, 0, []),
    )
    words = [f"w{i}" for i in range(40)]
    texts = [f"{i} " + " ".join(words[i : i + n]) for i, n in ((3, 12), (5, 13), (20, 11))]
    found = train.keep_prompts(llm, texts, tmp_path / "p.jsonl", train.runs(" ".join(words)))
    assert [row["prompt"] for row in read_lines(tmp_path / "p.jsonl")] == [texts[0], texts[2]]
    again = train.keep_prompts(llm, ["other"], tmp_path / "p.jsonl", set())
    assert [p.prompt for p in again] == [p.prompt for p in found] and len(found) == 2
    with pytest.raises(ValueError, match=r"p.jsonl holds some of the evaluation prompts; choose"):
        train.keep_prompts(llm, [], tmp_path / "p.jsonl", train.runs(texts[0]))


def test_an_epoch_has_every_example_once(monkeypatch):
    """In blocks that fit into memory, one after the other, each shuffled. Hidden states tell where
    they are from; going on gives the batches that an uninterrupted run would have had."""
    texts = [([1], [100 * i + j for j in range(n)]) for i, n in enumerate((5, 3, 9, 1, 2, 4))]
    weight = torch.zeros(1, 1)
    target = SimpleNamespace(embed=SimpleNamespace(weight=weight), args=SimpleNamespace(dim=1))
    loads = []

    def states(_, block):
        loads.append(len(block))
        token = torch.tensor([t for _, answer in block for t in answer])
        end = torch.tensor([len(answer) for _, answer in block]).cumsum(0)
        return States(
            token[:, None].float(), token, end.repeat_interleave(end.diff(prepend=end[:1] * 0))
        )

    monkeypatch.setattr(train, "hidden_states", states)
    monkeypatch.setattr(train, "CPU_ROOM", 8 * 36)  # bytes of so many positions: 4 + 32
    options = SimpleNamespace(batch_size=3, seed=0, rank=0)

    def first(count, start=0):
        plan = train.batches(target, texts, 1, options, start)
        return [next(plan) for _ in range(count)]

    # Blocks of 5 + 3, 9 and 1 + 2 + 4 positions, of which 6, 8 and 4 have a next one.
    epoch = first(5)
    assert loads == [2, 1, 3]
    met = [int(x) for state, *_ in epoch for x in state[:, 0]]
    assert len(met) == len(set(met)) == 15
    assert {x // 100 for x in met[:6]} == {0, 1} and {x // 100 for x in met[6:12]} == {2}
    assert met[:6] != sorted(met[:6])
    for state, tokens, *_ in epoch:
        assert torch.equal(tokens - state.long(), torch.tensor([[0, 1]] * 3))
    (again,) = first(1, start=3)
    assert torch.equal(again[0], epoch[3][0]) and not torch.equal(first(6)[5][0], epoch[0][0])


def test_drafts_start_where_decoding_goes():
    """Against the loop that decoding is, text by text."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (200,), generator=generator)
    end = sizes.cumsum(0).repeat_interleave(sizes)
    left = end - torch.arange(len(end)) - 1
    accepted = torch.randint(5, (len(end),), generator=generator).minimum(left)
    expected, first = set(), 0
    for stop in sizes.cumsum(0).tolist():
        at, first = first, stop
        while at + 1 < stop:  # else the text is whole
            expected.add(at)
            at += int(accepted[at]) + 1
    assert set(train.draft_starts(accepted, end).nonzero()[:, 0].tolist()) == expected


def test_a_small_memory_trains_block_by_block(target, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CPU_ROOM", 600 * (4 * 400 + 32))  # bytes: 600 positions
    assert run(target, prompts, tmp_path, steps=120, batch_size=256, inner_dim=32) == 0
    rows = [row for row in read_lines(tmp_path / "metrics.jsonl")]
    assert rows[-1]["accepted"][0] > 0.9


# ---- what is written ----


def draft_config(**changes):
    """The config of a run for `tiny_llama`."""
    options = {"n_predict": 3, "inner_dim": 32, "tie_weights": True, "scale_input": True}
    options |= {"checkpoint": "here", "base_model": "owner/it"}
    options |= {"draft_vocab_size": None, "emb_rank": 0} | changes
    target = SimpleNamespace(dim=48, vocab_size=97)
    return train.speculator_config(SimpleNamespace(**options), target)


def test_later_heads_learn_from_positions_drawn_by_their_weight():
    """Their losses are nearly those of all positions, of which some weigh more and some nothing."""
    torch.manual_seed(0)
    speculator = train.new_speculator(SpeculatorArgs(48, 32, 6, 97, tie_weights=True), [], 0, "cpu")
    losses, rows = HeadLosses(speculator, torch.randn(97, 48)), []
    for good in (True, False):
        hidden, tokens = torch.randn(1, 48), torch.randint(97, (1, 1))
        state = speculator.start(hidden)
        for head in range(6):
            state, logits = speculator.step(head, state, tokens[:, -1])
            token = logits.argmax(-1) if good else logits.median(-1).indices
            tokens = torch.cat((tokens, token[:, None]), 1)
        rows.append((hidden, tokens, torch.randn(1, 6, 48), torch.ones(1, 6, dtype=torch.bool)))
    rows.append((*rows[0][:3], torch.arange(6)[None] < 1))  # the last token of its text is near
    each = torch.stack([losses(*row) for row in rows])  # [3 n]
    assert (each[0] != each[1]).all() and (each[2, 1:] == 0).all()
    many = torch.tensor(random.Random(0).sample([0] * 600 + [1] * 1200 + [2] * 300, 2100))
    computed, step = [], speculator.step
    speculator.step = lambda i, state, token: computed.append(len(state)) or step(i, state, token)
    together = losses(*(torch.cat(parts)[many] for parts in zip(*rows, strict=True)))
    assert computed == [2100, 2100, 1050, 1050, 525, 525]
    expected = each[many].sum(0) / torch.tensor([2100] + [1800] * 5)
    torch.testing.assert_close(together[:2], expected[:2])
    torch.testing.assert_close(together[2:], expected[2:], rtol=0.03, atol=0)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("drafted", [None, 12])
def test_saved_weights_load_as_they_were(tmp_path, tie, drafted):
    """Under the published names, in float16; tied tensors are stored once."""
    config = draft_config(tie_weights=tie, draft_vocab_size=drafted)
    texts = [([1], [5, 6, 7, 5, 6, 5, *range(20, 33)])]
    args = SpeculatorArgs.from_config(config)
    speculator = train.new_speculator(args, texts, 3, "cpu")
    train.save_speculator(speculator, config, tmp_path)
    loaded = load_speculator(tmp_path)
    assert loaded.args == args
    assert (args.draft_vocab_size, args.tie_weights, args.base_model) == (drafted, tie, "owner/it")
    for name, param in speculator.named_parameters():
        assert torch.equal(loaded.get_parameter(name), param.half().float()), name
    names = {f"speculator.{name}" for name, _ in speculator.named_parameters()}
    names |= {"speculator.emb.0.weight", "speculator.head.0.weight", "speculator.ln.0.bias"}
    assert set(load_file(tmp_path / "model.safetensors")) == names | (
        {"draft_ids"} if drafted else set()
    )
    if drafted:  # the most frequent tokens of the text: 5, 6, 7 and the first nine of the others
        assert loaded.draft_ids.tolist() == [5, 6, 7, *range(20, 29)]


def test_weights_in_int8(tmp_path):
    """Half a step of 127 to the largest number of a row is the most that a number may be off."""
    config = draft_config(draft_vocab_size=12)
    texts = [([1], [5, 6, 7, 5, 6, 5, *range(20, 33)])]
    speculator = train.new_speculator(SpeculatorArgs.from_config(config), texts, 3, "cpu")
    train.save_speculator(speculator, config, tmp_path, "int8")
    loaded = load_speculator(tmp_path)
    assert loaded.eight_bit and not speculator.eight_bit
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["speculator.proj.1.weight"].dtype == torch.int8
    for name, param in speculator.named_parameters():
        found = loaded.get_parameter(name)
        if param.dim() == 1:
            assert torch.equal(found, param.half().float()), name
        else:  # the scale itself is rounded to float16: 127 of its steps of 2**-11
            step = param.abs().amax(1, keepdim=True) / 127
            assert ((found - param).abs() <= step * (0.5 + 127 * 2**-11 + 1e-4)).all(), name
            assert not torch.equal(found, param), name


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-3), ("int8", 0.02)])
@pytest.mark.parametrize("tie", [True, False])
def test_a_rank_is_stored_and_loads_as_rows(tmp_path, tie, dtype, most):
    """Tokens outside the draft vocabulary begin alike. `most`: three factors, each off by 2**-12 of
    a number, or by a step of 127 to the largest of a row over sqrt(12), which is less than 1 %."""
    config = draft_config(tie_weights=tie, draft_vocab_size=12, emb_rank=5)
    args, texts = SpeculatorArgs.from_config(config), [([1], list(range(20, 32)))]
    speculator = train.new_speculator(args, texts, 3, "cpu", torch.randn(97, 48))
    outside = torch.tensor([t for t in range(97) if not 20 <= t < 32])
    for emb in speculator.emb:
        assert len(emb(speculator.emb_row).unique(dim=0)) == 13
        assert torch.equal(emb(speculator.emb_row[outside]), emb.weight[-1:].expand(85, -1))
        torch.testing.assert_close(emb.down.var(0, correction=0), torch.ones(5))
        torch.nn.init.normal_(emb.up, std=0.1)
    train.save_speculator(speculator, config, tmp_path, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    kind = getattr(torch, dtype)
    for i in range(len(speculator.emb)):
        for name, shape in {"weight": (13, 32), "down": (85, 5), "up": (5, 32)}.items():
            tensor = stored[f"speculator.emb.{i}.{name}"]
            assert (tensor.shape, tensor.dtype) == (shape, kind)
    loaded = load_speculator(tmp_path)
    assert loaded.args == args and not any(p.requires_grad for p in loaded.parameters())
    for ours, emb in zip(speculator.emb, loaded.emb, strict=True):
        assert type(emb) is torch.nn.Embedding and emb.weight.shape == (97, 32)
        for tokens in (outside, torch.arange(20, 32)):
            want, got = ours(speculator.emb_row[tokens]), emb(loaded.emb_row[tokens])
            assert (got - want).norm() < most * want.norm()


def test_a_ranked_speculator_of_the_demos_size_travels(tmp_path):
    """32 MiB in all, and no file of 16."""
    sizes = {"n_predict": 8, "inner_dim": 1536, "draft_vocab_size": 9216, "emb_rank": 32}
    config = draft_config(**sizes) | {"emb_dim": 576, "vocab_size": 49152}
    args, texts = SpeculatorArgs.from_config(config), [([1], list(range(9216)))]
    speculator = train.new_speculator(args, texts, 0, "cpu", torch.randn(49152, 576))
    train.save_speculator(speculator, config, tmp_path, "int8")
    files = [file.stat().st_size for file in tmp_path.iterdir()]
    assert sum(files) < 2**25 and max(files) < 2**24


def test_scales_that_do_not_fit_are_named(tmp_path):
    config = draft_config()
    speculator = train.new_speculator(SpeculatorArgs.from_config(config), [], 0, "cpu")
    train.save_speculator(speculator, config, tmp_path, "int8")
    good = load_file(file := tmp_path / "model.safetensors")
    name = "speculator.head.0.weight"
    bad = {"short": good[f"{name}_scale"][1:]}, {"float": good[name].float()}, {"gone": None}
    for change in bad:
        (what, tensor), tensors = *change.items(), dict(good)
        tensors[name if what == "float" else f"{name}_scale"] = tensor
        if what == "gone":
            tensors[f"{name}_scale"] = tensors.pop(name)[:, 0].float()
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f"{name}_scale must be the scales .rows. of an int8"):
            load_speculator(tmp_path)


def test_weights_are_cut_into_files_that_travel(tmp_path, monkeypatch):
    """No file has more bytes of tensors than asked for, unless one tensor is larger; the index
    finds all of them; what a run before left there goes away."""
    config = draft_config(tie_weights=False)
    speculator = train.new_speculator(SpeculatorArgs.from_config(config), [], 0, "cpu")
    train.save_speculator(speculator, config, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    most = 97 * 32 * 2 + 32 * 48 * 2  # an embedding and the first projection; two do not fit
    monkeypatch.setattr(train, "SHARD", most)
    train.save_speculator(speculator, config, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 5
    assert all(sum(t.nbytes for t in part.values()) <= most for part in tensors)
    loaded = load_speculator(tmp_path)
    for name, param in speculator.named_parameters():
        assert torch.equal(loaded.get_parameter(name), param.half().float()), name


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_draft_vocabulary_changes_no_text(tmp_path, temperature, rank):
    """Drafts come from it alone; what it lacks the target still says."""
    tiny_llama(tmp_path / "target")
    config = draft_config(draft_vocab_size=40, emb_rank=rank)
    args, texts = SpeculatorArgs.from_config(config), [([1], list(range(0, 80, 2)))]
    speculator = train.new_speculator(args, texts, 0, "cpu", torch.randn(97, 48))
    train.save_speculator(speculator, config, mkdir(tmp_path / "draft"))
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=4)
    prompts = [[3, 14, 15], [92, 65, 35, 89, 79]]
    plain = LLM(tmp_path / "target").generate(prompts, params)
    llm = LLM(tmp_path / "target", {"model": tmp_path / "draft"}, batch_size=2)
    drafted, draft = [], llm.engine.speculator.draft
    llm.engine.speculator.draft = lambda *a: drafted.append(draft(*a)) or drafted[-1]
    outputs = llm.generate(prompts, params)
    tokens = [out.outputs[0].token_ids for out in outputs]
    assert tokens == [out.outputs[0].token_ids for out in plain]
    assert {t % 2 for text in tokens for t in text} == {0, 1}
    assert all((ids % 2 == 0).all() and (ids < 80).all() for ids in drafted)
    assert sum(out.steps for out in outputs) < 120 or temperature == 0  # with shared noise


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def test_draft_logits_are_those_of_the_full_vocabulary(tmp_path):
    """Against a speculator without one whose rows are the same, the shared one repeated."""
    args = SpeculatorArgs.from_config(draft_config(draft_vocab_size=40))
    small = train.new_speculator(args, [([1], list(range(0, 80, 2)))], 0, "cpu")
    full = MLPSpeculator(SpeculatorArgs(48, 32, 3, 97, True, True))
    rows = torch.full((97,), 40)
    rows[small.draft_ids] = torch.arange(40)
    state = dict(small.named_parameters())
    state |= {"emb.0.weight": state["emb.0.weight"][rows]}
    head = torch.zeros(97, 32)
    head[small.draft_ids] = state["head.0.weight"]
    full.load_state_dict(
        {k: v.detach() for k, v in state.items()} | {"head.0.weight": head.detach()}
    )
    hidden, token = torch.randn(97, 48), torch.arange(97)
    for i in range(3):
        (a, small_logits), (b, logits) = small.step(i, hidden, token), full.step(i, hidden, token)
        assert torch.equal(a, b)
        torch.testing.assert_close(small_logits, logits[:, small.draft_ids])
        hidden = a


def test_repeated_tokens_are_counted():
    assert train.repeated(list(range(40))) == 0
    assert train.repeated([1, 2, 3, 4] * 5, n=8) == 20 - 7 - 4  # of 13 grams, 4 are different


def test_several_processes_train_one_speculator(target, prompts, tmp_path):
    """torchrun with two: each writes half of the text, and one set of weights comes out."""
    argv = ["--checkpoint", target, "--prompts", prompts, "--output", tmp_path, "--n-predict", 3]
    options = {"steps": 150, "batch-size": 128, "inner-dim": 32, "rows": 16, "own-prompts": 0}
    options |= {"draft-vocab-size": 60}  # one for both
    argv += [word for name, value in options.items() for word in (f"--{name}", value)]
    script = Path(train.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", 2, script, *argv]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [tmp_path / f"text-{rank}-of-2.jsonl" for rank in (0, 1)]
    assert [len(text.read_text().splitlines()) for text in texts] == [98, 98]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report[0]["tokens_per_step"] == 21 / 6


# ---- what goes wrong ----


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt"', "not JSON"),
        ('{"text": "x"}', "expected either prompt or messages"),
        ('{"prompt": "x", "messages": []}', "expected either prompt or messages"),
        ('{"messages": [{"role": "user"}]}', "message 0 has no content"),
        ('{"messages": []}', "the conversation has no messages"),
        ('["x"]', "expected a JSON object"),
        (json.dumps({"prompt": " one" * 200}), "and max_seq_len 128 leaves no room"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named_by_line(target, tmp_path, capsys, line, words):
    """And the others are."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n\n' + line + '\n{"prompt": "y", "category": "z"}')
    llm = LLM(target, load=False)
    ids = [llm.tokenizer.encode(f"<|user|>{text}<|answer|>") for text in "xy"]
    assert sorted(request.prompt for request in train.read_prompts(llm, [file])) == sorted(ids)
    error = last_line(capsys)
    assert error.startswith(f"train: {file}:3 is left out: ") and words in error


@pytest.mark.parametrize(("lines", "count"), [("", 0), ('{"prompt": "x"}\n' * 3, 1)])
def test_too_few_prompts(target, prompts, tmp_path, capsys, lines, count):
    (file := tmp_path / "p.jsonl").write_text(lines)
    assert run(target, file, tmp_path / "out") == 1
    assert last_line(capsys) == f"train: {file}: {count} prompts; at least 2 needed"
    assert count or run(target, prompts, tmp_path / "out", "--eval-prompts", file) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["n-predict", "steps", "rows", "batch-size"])
def test_options_out_of_range(target, prompts, tmp_path, capsys, option):
    assert run(target, prompts, tmp_path / "out", **{option: 0}) == 1
    assert last_line(capsys) == f"train: --{option} 0 is out of range: at least 1"


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_learning_rates_out_of_range(target, prompts, tmp_path, capsys, rate):
    assert run(target, prompts, tmp_path / "out", learning_rate=rate) == 1
    assert last_line(capsys) == f"train: --learning-rate {rate} is out of range: above 0"


def test_a_draft_vocabulary_larger_than_the_whole(target, prompts, tmp_path, capsys):
    assert run(target, prompts, tmp_path / "out", draft_vocab_size=401) == 1
    assert "draft_vocab_size must be an integer of 1 to 400, found 401" in last_line(capsys)


@pytest.mark.parametrize("value", [-1, 341])
def test_a_rank_out_of_range(target, prompts, tmp_path, capsys, value):
    assert run(target, prompts, tmp_path / "out", draft_vocab_size=60, emb_rank=value) == 1
    assert f"emb_rank must be an integer of 1 to 340, found {value}" in last_line(capsys)


@pytest.mark.parametrize("options", [{}, {"draft_vocab_size": 400}])
def test_a_rank_of_no_tokens(target, prompts, tmp_path, capsys, options):
    """Is refused, where it was asked for."""
    assert run(target, prompts, tmp_path / "no", emb_rank=8, **options) == 1
    assert "emb_rank needs a draft_vocab_size below vocab_size" in last_line(capsys)
    assert run(target, prompts, tmp_path / "out", steps=1, **options) == 0


def test_the_command_of_the_readme_runs(target, prompts, tmp_path):
    readme = (Path(train.__file__).parent / "README.md").read_text()
    (command,) = re.findall(
        r"python train.py (.*)", "".join(re.findall(r"```bash\n(.*?)```", readme, re.S))
    )
    values = {"TARGET": target, "prompts.jsonl": prompts, "my-accelerator": tmp_path / "out"}
    argv = [str(values.get(word, word)) for word in command.split()]
    assert train.main([*argv, "--steps", "2", "--batch-size", "64", "--own-prompts", "0"]) == 0
    load_speculator(tmp_path / "out")


def test_a_target_without_a_chat_template(prompts, tmp_path, capsys):
    save_story(mkdir(tmp_path / "target"))
    assert run(tmp_path / "target", prompts, tmp_path / "out") == 1
    assert "no chat template; put a chat_template.jinja there" in last_line(capsys)


def test_other_settings_do_not_mix_with_what_is_there(target, prompts, whole, capsys):
    assert run(target, prompts, whole, seed=7) == 1
    assert last_line(capsys).endswith("was begun with seed 0, not 7; choose another --output")
    assert run(target, prompts, whole, steps=50) == 1
    assert "delete its state.pt to train anew on its text" in last_line(capsys)


def test_training_may_begin_anew_on_the_text(target, prompts, whole, tmp_path, monkeypatch):
    """Under other settings of its own, as the error of a bad loss advises."""
    assert run(target, prompts, tmp_path, learning_rate=1e30, batch_size=32) == 1
    monkeypatch.setattr(train, "decode_loop", None)  # nothing is to be written
    monkeypatch.setattr(train, "report", lambda *_: None)
    assert run(target, prompts, tmp_path) == 0
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_a_template_may_write_the_date(target, prompts, tmp_path, monkeypatch):
    """A run goes on on another day."""
    dated, today = tmp_path / "target", ["1"]
    shutil.copytree(target, dated)
    (dated / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + TEMPLATE)
    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda _: today[0]))
    monkeypatch.setattr(tokenizer, "datetime", clock)
    assert run(dated, prompts, tmp_path / "out", steps=1) == 0
    (tmp_path / "out" / "state.pt").unlink()
    today[0] = "2"
    assert run(dated, prompts, tmp_path / "out", steps=1) == 0
    (dated / "chat_template.jinja").write_text("Q:" + TEMPLATE)
    assert run(dated, prompts, tmp_path / "out", steps=1) == 1  # another text


def test_prompts_from_a_pipe_are_refused(target, tmp_path, capsys):
    os.mkfifo(pipe := tmp_path / "pipe")
    assert run(target, pipe, tmp_path / "out") == 1
    assert "it is read twice, so a pipe will not do" in last_line(capsys)


def test_a_full_disk_loses_nothing(target, prompts, whole, tmp_path, monkeypatch, capsys):
    """The state that was whole stays, and the run goes on from it."""
    monkeypatch.setattr(train, "LOG_EVERY", 10)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) == 3:
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert run(target, prompts, tmp_path) == 1
    assert "state.pt cannot be written; is the disk full? ([enforce fail" in last_line(capsys)

    def no_room(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_torch_state_dict", no_room)
        assert run(target, prompts, tmp_path) == 1
    assert "train: Error while serializing: No space left" in last_line(capsys)
    assert run(target, prompts, tmp_path) == 0
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    steps = [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == [10, 20, 30, 40]


def test_out_of_memory_says_what_to_lower(target, prompts, tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(HeadLosses, "forward", failing)
    assert run(target, prompts, tmp_path) == 1
    line = last_line(capsys)
    assert "out of memory" in line and "--rows" in line and "--batch-size" in line


def test_a_loss_that_is_no_number_ends_the_run(target, prompts, tmp_path, capsys):
    assert run(target, prompts, tmp_path, learning_rate=1e30) == 1
    assert "lower --learning-rate" in last_line(capsys)


def test_the_plot(whole, capsys):
    pytest.importorskip("matplotlib")
    train.plot(whole)
    assert (whole / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(whole, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.plot(whole)
    assert '".[plot]"' in last_line(capsys)


def test_story_is_what_the_target_says(target):
    assert len(story_ids(target)) == 20  # and the end: 21 tokens, of which the tests count
