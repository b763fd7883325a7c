"""LLM and the command line, from checkpoint directories to text, in float32 on the CPU."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import UserDict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import (
    ANSWER,
    END,
    STORY,
    STORY_VOCAB,
    USER,
    answer,
    assert_one_line,
    greedy,
    load,
    pieces_and_merges,
    printed,
    run_main,
    save_tokenizer,
    tiny_llama,
    tiny_speculator,
    train_sentencepiece,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer

import fastspec
from fastspec import LLM, SamplingParams
from speculator import load_speculator
from tokenizer import load_tokenizer

REPOSITORY = Path(fastspec.__file__).parent


@pytest.fixture(scope="module")
def llms(dirs):
    """The story told plainly, by right drafts and by partly right ones: {name: LLM}."""
    return {
        "plain": load(dirs.story),
        "right": load(dirs.story, dirs.right),
        "partly": load(dirs.story, dirs.partly),
        "partly, k = 1": load(dirs.story, dirs.partly, 1),
    }


@pytest.fixture(params=["plain", "right", "partly", "partly, k = 1"])
def llm(llms, request):
    return llms[request.param]


# ---- prompts and parameters of the Python API ----


def test_the_story_is_told(llm):
    """The checkpoint made by hand does what the tests below rely on."""
    out = answer(llm)
    assert (out.text, out.finish_reason) == (STORY, "stop")
    assert out.token_ids[-1] == END


def test_one_prompt_or_many_as_text_or_ids(dirs):
    """All forms of the same prompts give the same answers, in the order of the prompts."""
    llm = load(dirs.random, batch_size=2)
    texts = [" one two", "three", " ten ten ten"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    outputs = llm.generate(texts, greedy(max_tokens=9))
    assert [o.prompt for o in outputs] == texts
    assert [o.prompt_token_ids for o in outputs] == ids
    answers = [o.outputs[0] for o in outputs]
    assert len({a.text for a in answers}) == 3
    assert [o.outputs[0] for o in llm.generate(ids, greedy(max_tokens=9))] == answers
    for text, prompt, expected in zip(texts, ids, answers, strict=True):
        assert answer(llm, text, greedy(max_tokens=9)) == expected
        assert answer(llm, prompt, greedy(max_tokens=9)) == expected
    assert llm.generate([texts[0], ids[1]], greedy(max_tokens=9))[1].outputs[0] == answers[1]
    assert llm.generate(ids)[0].prompt is None
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_params(llm):
    params = [greedy(max_tokens=3), greedy(stop=" four"), greedy(stop_token_ids=[END])]
    first, second, third = (o.outputs[0] for o in llm.generate(["Q"] * 3, params))
    assert (first.text, first.finish_reason) == (" one two three", "length")
    assert (second.text, second.finish_reason) == (" one two three", "stop")
    assert (third.text, third.finish_reason) == (STORY, "stop")


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_params_than_prompts_is_refused(llms, count):
    with pytest.raises(ValueError, match=rf"^2 prompts, but {count} SamplingParams$"):
        llms["plain"].generate(["Q", "Q"], [greedy()] * count)


def test_params_default_to_those_of_vllm(llms):
    """No params: 16 tokens at temperature 1, where the story is next to certain."""
    assert len(answer(llms["plain"], "Q", SamplingParams()).token_ids) == 16
    assert llms["plain"].generate("Q")[0].outputs[0].finish_reason == "length"


def test_a_checkpoint_without_tokenizer_takes_ids(dirs):
    """The ids are those that the same weights give beside a tokenizer; there is just no text."""
    bare, full = load(dirs.bare), load(dirs.random)
    params = greedy(max_tokens=12)
    out = answer(bare, [3, 4, 5], params)
    assert out.token_ids == answer(full, [3, 4, 5], params).token_ids
    assert (out.text, out.finish_reason) == ("", "length")
    with pytest.raises(ValueError, match=r"has no tokenizer files: give token ids, not text$"):
        bare.generate("Q")
    with pytest.raises(ValueError, match=r"has no tokenizer files: stop strings need one$"):
        bare.generate([3, 4], greedy(stop="x"))


@pytest.mark.parametrize("bad", [STORY_VOCAB, -1, 10**12, 1.5, None])
def test_what_is_no_token_id_is_refused(llms, bad):
    with pytest.raises(ValueError, match=rf"^prompt 1: {bad} is not a token id of 0\.\.399$"):
        llms["plain"].generate([[1, 2], [1, bad]])


def test_an_empty_prompt_is_refused(llms):
    for prompt in ("", [[]]):
        with pytest.raises(ValueError, match=r"^prompt 0 is empty$"):
            llms["plain"].generate(prompt)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_seeds(dirs, speculative, temperature):
    """A fixed seed repeats, an absent one is fresh for each request, and greedy ignores both."""
    llm = load(dirs.random, dirs.draft if speculative else None, batch_size=2)

    def two(seed):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=24)
        return [o.outputs[0].token_ids for o in llm.generate([[5, 6]] * 2, params)]

    assert two(3) == two(3)
    assert two(3)[0] == two(3)[1]
    assert (two(None)[0] == two(None)[1]) is (temperature == 0)
    assert (two(3) == two(4)) is (temperature == 0)
    for seed in (-2, 2**63 - 1, 2**70):
        assert two(seed) == two(seed)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}])
def test_texts_do_not_depend_on_speculation_or_batch(dirs, options):
    """The whole path, text and ids: plain, 1 and 3 drafts, one row, two, and one for each."""
    prompts = [" one", " two three", " nine nine", "x", "Hello"]
    common = options | {"ignore_eos": True}
    params = [SamplingParams(max_tokens=20 + i, seed=i, **common) for i in range(5)]
    variants = [(None, None, 1), (dirs.draft, 1, 2), (dirs.draft, 3, 5), (dirs.draft, 0, 2)]
    answers = [
        [o.outputs[0] for o in load(dirs.random, s, k, batch_size=b).generate(prompts, params)]
        for s, k, b in variants
    ]
    assert answers[1:] == answers[:1] * 3
    assert [len(a.token_ids) for a in answers[0]] == [20, 21, 22, 23, 24]


# ---- ends ----


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (" seven", STORY[: STORY.index(" seven")]),
        (" one", ""),
        ("ve é", STORY[: STORY.index("ve é")]),
        ("é€", STORY[: STORY.index("é")]),
        ("€", STORY[: STORY.index("€")]),
        ("four five é€😀 six", STORY[: STORY.index("four")]),
        ([" ten", "e four", "six"], STORY[: STORY.index("e four")]),
        (["seven", "six seven"], STORY[: STORY.index("six")]),
        (["two three four", "three"], STORY[: STORY.index("three")]),
        (["three fox", " sixty", "eight nine ten."], STORY),
        ("n ten", STORY),
        ("e ten", STORY[: STORY.index("e ten")]),
        ("ten", STORY[: STORY.index("ten")]),
    ],
)
def test_stop_strings(llm, stop, text):
    """Cut before the first of them, though they span tokens and steps; half of one is text. The
    ids end with the token that completed it, whatever the speculator. Nothing of it is streamed.
    """
    params = greedy(stop=stop)
    out = answer(llm, "Q", params)
    assert (out.text, out.finish_reason) == (text, "stop")
    decode, stops = llm.tokenizer.decode, params.stop
    if text != STORY:
        assert any(s in decode(out.token_ids) for s in stops)
        assert not any(s in decode(out.token_ids[:-1]) for s in stops)
    pieces = [piece for _, piece, _ in llm.stream("Q", params)]
    assert "".join(pieces) == text


def test_a_stop_string_that_is_not_met_ends_with_length(llm):
    out = answer(llm, "Q", greedy(stop="two one", max_tokens=5))
    assert (out.text, out.finish_reason) == (" one two three four five", "length")


def test_held_back_text_comes_out_at_the_end(llm):
    """The beginning of a stop string is held back while it may become one, and no longer."""
    params = greedy(stop=["five or six", " fivefold"], max_tokens=5)
    pieces = [piece for _, piece, _ in llm.stream("Q", params)]
    assert "".join(pieces) == " one two three four five"
    assert pieces[-1].endswith(" five")


def test_a_row_is_used_again_after_a_stop_string(llms):
    """What a row still emits for the ended request goes to nobody: one row, many requests."""
    prompts, params = ["Q", " two", "Q"] * 3, [greedy(stop=s) for s in (" four", "é", " ten")] * 3
    for llm in llms.values():
        texts = [o.outputs[0].text for o in llm.generate(prompts, params)]
        assert texts == 3 * [" one two three", " three four five ", STORY[: -len(" ten")]]


def test_stop_token_ids_end_an_answer_and_are_not_text(llm):
    six = llm.tokenizer.encode(" six")
    out = answer(llm, "Q", greedy(stop_token_ids=six))
    assert (out.text, out.finish_reason) == (STORY[: STORY.index(" six")], "stop")
    assert out.token_ids[-1:] == six
    assert out.token_ids.count(six[0]) == 1


def test_ignore_eos_goes_on(llm):
    """The story begins again after its end; stop_token_ids still end it."""
    out = answer(llm, "Q", greedy(ignore_eos=True, max_tokens=42))
    assert (out.text, out.finish_reason, len(out.token_ids)) == (STORY * 2, "length", 42)
    out = answer(llm, "Q", greedy(ignore_eos=True, stop_token_ids=[END]))
    assert (out.text, out.finish_reason) == (STORY, "stop")


@pytest.mark.parametrize(
    ("count", "reason"), [(1, "length"), (2, "length"), (20, "length"), (21, "stop"), (22, "stop")]
)
def test_max_tokens(llm, count, reason):
    """The story has 20 tokens and its end: an end in the last allowed place is still a stop."""
    out = answer(llm, "Q", greedy(max_tokens=count))
    assert len(out.token_ids) == min(count, 21)
    assert out.finish_reason == reason
    assert STORY.startswith(out.text.rstrip("\ufffd"))


def test_max_seq_len_ends_an_answer(dirs):
    """Prompt and answer together, with and without a speculator."""
    for speculator in (None, dirs.right):
        llm = load(dirs.story, speculator, max_seq_len=8)
        out = answer(llm, "QQQ")
        assert (len(out.token_ids), out.finish_reason) == (5, "length")
        with pytest.raises(ValueError, match=r"^prompt 0 has 8 tokens, and max_seq_len 8 leaves"):
            llm.generate("Q" * 8)


def test_end_ids_are_united(dirs, copy):
    """Those of config.json, generation_config.json and the tokenizer each end an answer."""
    words = [" four", " six", " nine"]
    ids = [load_tokenizer(dirs.story).encode(word)[0] for word in words]
    named = {"config": {"eos_token_id": ids[0]}, "generation_config": {"eos_token_id": ids[1:]}}
    llm = load(copy("story", **named))
    assert llm.end_ids == {*ids, END}
    answers = [o.outputs[0] for o in llm.generate(["Q", *words], greedy())]
    assert [a.text for a in answers] == [" one two three", " five é€😀", " seven eight", " ten"]
    assert [a.token_ids[-1] for a in answers] == [*ids, END]
    assert {a.finish_reason for a in answers} == {"stop"}


# ---- the space that sentencepiece puts before each text ----


@pytest.mark.parametrize("text", ["fox jumps", " fox", "\n x"])
def test_an_answers_first_space_is_text_where_it_goes_on_a_prompt(copy, text):
    """To a prompt's text it adds what both decode to together. A turn of a chat is what
    transformers decodes from its ids alone."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = {"eos_token": "</s>", "chat_template": template}
    directory = copy("random", tokenizer_config=config)
    (directory / "tokenizer.json").unlink()
    model = train_sentencepiece(vocab_size=STORY_VOCAB)
    (directory / "tokenizer.model").write_bytes(model)
    vocab, merges = pieces_and_merges(model)
    theirs, llm = LlamaTokenizer(vocab=vocab, merges=merges), load(directory, load=False)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    prompt, turn = "the quick brown", [{"role": "user", "content": "the quick brown"}]
    plain = llm.request(prompt, greedy(), "prompt")
    by_ids = llm.request(plain.prompt, greedy(), "prompt")
    whole = theirs.decode(plain.prompt + ids, skip_special_tokens=True).removeprefix(prompt)
    for request, expected in (
        (plain, whole),
        (by_ids, whole),
        (llm.chat_request(turn, greedy(), "turn"), theirs.decode(ids)),
    ):
        answer = fastspec.Answer(request, llm.tokenizer, 0)
        assert answer.take(fastspec.Progress(0, ids, 0, True, 0.0)) == expected
    assert whole == " " + text


# ---- streaming ----


def test_a_stream_is_the_text_in_whole_characters(llm):
    """é€😀 come as nine tokens: each is streamed once it is whole, and nothing twice."""
    parts = list(llm.stream("Q", greedy()))
    pieces = [piece for _, piece, _ in parts]
    assert "".join(pieces) == STORY
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 4
    assert [output is not None for *_, output in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1][2].outputs[0].text == STORY


@pytest.mark.parametrize(
    ("count", "end"),
    [
        (7, " \ufffd"),
        (8, " é"),
        (9, " é\ufffd"),
        (10, " é\ufffd"),
        (11, " é€"),
        (12, " é€\ufffd"),
        (14, " é€\ufffd"),
        (15, " é€😀"),
    ],
)
def test_a_character_cut_by_max_tokens_is_marked_at_the_end(llm, count, end):
    """An answer that ends inside a character ends with U+FFFD, in the text and in the stream."""
    params = greedy(max_tokens=count)
    pieces = [piece for _, piece, _ in llm.stream("Q", params)]
    out = answer(llm, "Q", params)
    assert out.text == "".join(pieces) == " one two three four five" + end
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert out.text == llm.tokenizer.decode(out.token_ids)


def test_several_answers_stream_side_by_side(dirs):
    """Pieces come with the index of their prompt, and join to what generate gives."""
    llm = load(dirs.random, dirs.draft, batch_size=2)
    prompts, params = [" one", " two", " three"], greedy(max_tokens=15, stop="a")
    texts = [o.outputs[0].text for o in llm.generate(prompts, params)]
    streamed = [""] * 3
    for index, piece, _ in llm.stream(prompts, params):
        streamed[index] += piece
    assert streamed == texts


def test_a_stream_may_be_left_early(llms):
    """What was under way does not reach the next call."""
    for llm in llms.values():
        stream = llm.stream(["Q", "Q"], greedy())
        next(stream)
        stream.close()
        assert answer(llm, " two").text == STORY.removeprefix(" one two")


# ---- checkpoints from the hub, dtype ----


@pytest.fixture
def hub(dirs, monkeypatch):
    """A hub with org/story and org/right; the list of what was asked of it."""
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        return str(getattr(dirs, repo.removeprefix("org/")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_ids_are_fetched_at_their_revisions(hub):
    config = {"model": "org/right", "revision": "r2", "method": "mlp_speculator"}
    llm = LLM("org/story", config, revision="r1", dtype="float32", device="cpu")
    assert [(repo, options["revision"]) for repo, options in hub] == [
        ("org/story", "r1"),
        ("org/right", "r2"),
    ]
    assert answer(llm).text == STORY


def test_only_the_files_that_are_used_are_fetched(hub):
    load("org/story")
    options = hub[0][1]
    used = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    used += ["tokenizer.json", "chat_template.jinja", "generation_config.json"]
    used += ["tokenizer.model", "original/tokenizer.model", "added_tokens.json"]
    used += ["vocab.json", "merges.txt"]
    unused = ["pytorch_model.bin", "original/params.json", "onnx/model.safetensors", "README.md"]
    unused += ["consolidated.safetensors", "adapter_model.safetensors"]
    kept = filter_repo_objects(used + unused, allow_patterns=options["allow_patterns"])
    assert list(kept) == used
    assert len(hub) == 1


def test_bin_files_are_fetched_where_there_are_no_safetensors(hub, dirs, tmp_path):
    """Which is known from what the first request brought, so that a cache will do."""
    dirs.bin = tmp_path
    assert fastspec.local_checkpoint("org/bin") == tmp_path
    patterns = [options["allow_patterns"] for _, options in hub]
    files = ["config.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
    files += ["pytorch_model.bin.index.json", "training_args.bin", "optimizer.bin"]
    assert [list(filter_repo_objects(files, allow_patterns=p)) for p in patterns] == [
        files[:1],
        files[:4],
    ]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_cache_of_the_hub_is_enough_offline(tmp_path, monkeypatch, weights):
    snapshot = tmp_path / "models--org--small" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / weights).touch()
    (refs := tmp_path / "models--org--small" / "refs").mkdir()
    (refs / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fastspec.local_checkpoint("org/small") == snapshot
    with pytest.raises(ValueError, match="org/large: no such directory, and the hub said: "):
        fastspec.local_checkpoint("org/large")


def test_a_local_directory_asks_nothing_of_the_hub(hub, dirs):
    load(dirs.story, dirs.right)
    load(str(dirs.story))
    assert hub == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("401 Client Error\n\nRepository Not Found for url"), "401 Client Error"),
        (ValueError("  offline  "), "offline"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_failure_of_the_hub_is_one_line(monkeypatch, error, said):
    """Its first line, or its name where it says nothing (as a timed out connection does)."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=rf"^org/story: .* the hub said: {said}[^\n]*$"):
        load("org/story")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtype(dirs, name):
    """Of the weights and the cache."""
    engine = LLM(dirs.story, dtype=name, device="cpu").engine
    assert engine.model.embed.weight.dtype == engine.kv.dtype == getattr(torch, name)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_auto_on_a_cpu(dirs, tmp_path, monkeypatch, native, stored):
    """bfloat16 if it has instructions for that and the weights are stored in it, else float32,
    whatever config.json says."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    shutil.copytree(dirs.story, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    save_file({k: t.to(stored) for k, t in load_file(file).items()}, file)
    bfloat16 = native and stored == torch.bfloat16
    expected = torch.bfloat16 if bfloat16 else torch.float32
    assert LLM(tmp_path / "copy", device="cpu").engine.kv.dtype == expected


# ---- the command line ----


def figures(err):
    """The lines of the summary by their names."""
    pairs = (re.split(r" {2,}", line, maxsplit=1) for line in err.splitlines() if "  " in line)
    return dict(pairs)


def test_one_answer_is_printed(capsys, dirs):
    """The text that generate gives, and a line end."""
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.partly, "--prompt", "Q"]
    assert printed(capsys, *argv) == STORY + "\n"
    assert printed(capsys, *argv, "--max-new-tokens", 3) == " one two three\n"


def test_several_answers_are_printed_in_order(capsys, dirs):
    """Also with fewer rows than prompts, which end in another order."""
    prompts = ["Q", " nine", " two", "Q", " eight"]
    texts = [STORY, " ten", STORY.removeprefix(" one two"), STORY, " nine ten"]
    expected = "".join(f">>> {p}\n{t}\n\n" for p, t in zip(prompts, texts, strict=True))
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.partly, "--prompt", *prompts]
    for rows in ([], ["--batch-size", 1], ["--batch-size", 2], ["--batch-size", 7]):
        assert printed(capsys, *argv, *rows) == expected


def test_pieces_are_printed_as_they_come(capsys):
    output = fastspec.RequestOutput(None, [], [fastspec.CompletionOutput("one two")])

    def stream():
        yield 0, "one", None
        assert capsys.readouterr().out == "one"
        yield 0, " two", output

    assert list(fastspec.show(stream(), ["Q"])) == [output]
    assert capsys.readouterr().out == " two\n"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--temperature", 0.8, "--top-p", 0.9, "--seed", 7],
        ["--temperature", 1.0, "--top-k", 20, "--min-p", 0.02, "--seed", 8],
    ],
)
def test_the_text_is_the_same_without_speculator_and_with_any_number_of_drafts(
    capsys, dirs, options
):
    argv = ["--checkpoint", dirs.random, "--prompt", " one two", "--max-new-tokens", 40, *options]
    plain = printed(capsys, *argv)
    assert len(plain) > 20
    for k in (0, 1, 3):
        drafts = ["--speculator", dirs.draft, "--num-draft-tokens", k]
        assert printed(capsys, *argv, *drafts) == plain
    assert printed(capsys, *argv, "--speculator", dirs.draft) == plain


def test_options_reach_the_sampling(capsys, dirs):
    """A seed repeats, another one or none differs, and top-k 1, a tiny top-p and min-p 1 are
    greedy at any temperature."""
    argv = ["--checkpoint", dirs.random, "--prompt", " one two", "--max-new-tokens", 30]
    best, hot = printed(capsys, *argv), [*argv, "--temperature", 1.5]
    assert printed(capsys, *hot, "--seed", 1) == printed(capsys, *hot, "--seed", 1)
    texts = [printed(capsys, *hot, *seed) for seed in (["--seed", 1], ["--seed", 2], [], [])]
    assert len({best, *texts}) == 5
    for name, value in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)):
        assert printed(capsys, *hot, name, value) == best


@pytest.mark.parametrize(
    ("stop", "text"),
    [([" seven"], " six"), (["ven", "ight"], " six se"), ([" seven eight n"], " six")],
)
def test_stop_strings_end_the_printed_text(capsys, dirs, stop, text):
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.partly, "--prompt", " five"]
    start = STORY[STORY.index(" é") : STORY.index(" six")]
    assert printed(capsys, *argv, "--stop", *stop) == f"{start}{text}\n"


def test_max_seq_len_counts_prompt_and_answer(capsys, dirs):
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.right, "--prompt", "Q"]
    assert printed(capsys, *argv, "--max-seq-len", 5) == " one two three four\n"


def test_the_chat_template_is_used_where_there_is_one(capsys, dirs):
    """By default and with --chat the prompt is one user turn, with --no-chat it is as it is."""
    prompt = " one two"
    argv = ["--checkpoint", dirs.random, "--prompt", prompt, "--max-new-tokens", 20]
    llm, params = load(dirs.random), greedy(max_tokens=20)
    turn = [USER, *llm.tokenizer.encode(prompt), ANSWER]
    as_turn, as_it_is = answer(llm, turn, params).text, answer(llm, prompt, params).text
    assert as_turn != as_it_is
    assert printed(capsys, *argv) == printed(capsys, *argv, "--chat") == as_turn + "\n"
    assert printed(capsys, *argv, "--no-chat") == as_it_is + "\n"


def test_profile_writes_a_chrome_trace(capsys, dirs, tmp_path):
    file = tmp_path / "trace.json"
    argv = ["--checkpoint", dirs.story, "--prompt", "Q", "--max-new-tokens", 3, "--profile", file]
    assert printed(capsys, *argv) == " one two three\n"
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::argmax" in names


def test_summary_with_a_speculator(capsys, dirs):
    """21 tokens: five steps of four, as every draft is right, and one of the end, which was the
    first head's draft."""
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.right, "--prompt", "Q"]
    code, _, err = run_main(capsys, *argv)
    found = figures(err)
    assert code == 0
    assert (found["tokens"], found["tokens per step"]) == ("21", "3.50")
    assert found["accepted per head"].split() == ["1.00", "0.83", "0.83"]
    assert found["speculator"] == str(dirs.right)
    assert found["tokenizer"] == "tokenizer.json (byte-level BPE)"
    assert re.fullmatch(r"\d+\.\d per sequence", found["tokens/s"])
    assert re.fullmatch(r"\d+ ms", found["time to first token"])
    assert "no speculator" not in err


def test_summary_counts_wrong_drafts(capsys, dirs):
    """The draft after the first word and after each third one from there is wrong. Each answer
    takes eight steps: of 2 tokens, one of them a draft, six of 3, two of them drafts, and of the
    end, a draft."""
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.partly, "--prompt", "Q", "Q"]
    _, _, err = run_main(capsys, *argv)
    found = figures(err)
    assert (found["tokens"], found["tokens per step"]) == ("42", f"{21 / 8:.2f}")
    assert found["accepted per head"].split() == ["1.00", "0.75", "0.00"]


def test_summary_of_answers_that_took_one_step(capsys, dirs):
    """Of which nothing is known but the time to the first token."""
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.right, "--prompt", "Q"]
    found = figures(run_main(capsys, *argv, "--max-new-tokens", 4)[2])
    assert (found["tokens"], found["tokens/s"]) == ("4", "one step each")


def test_what_an_output_says_of_its_steps(llms):
    """The first step's end is the first token's time, and what it emits is not counted in the
    time after it."""
    for name, steps, first in (("plain", 21, 1), ("right", 6, 4), ("partly", 8, 2)):
        start = time.perf_counter()
        output = llms[name].generate("Q", greedy())[0]
        took = time.perf_counter() - start
        assert (output.steps, output.decode_tokens) == (steps, 21 - first)
        assert output.tokens_per_step == 21 / steps
        assert 0 < output.time_to_first_token < output.time_to_first_token + output.decode_time
        assert output.time_to_first_token + output.decode_time < took
    output = llms["right"].generate("Q", greedy(max_tokens=4))[0]
    assert (output.steps, output.decode_tokens, output.decode_time) == (1, 0, 0.0)


def test_summary_without_a_speculator_says_so(capsys, dirs):
    code, _, err = run_main(capsys, "--checkpoint", dirs.story, "--prompt", "Q", "Q")
    found = figures(err)
    assert code == 0
    assert err.startswith("fastspec: no speculator: plain decoding, one token per step\n")
    assert (found["tokens"], found["tokens per step"]) == ("42", "1.00")
    assert found["speculator"] == "none"
    assert "accepted per head" not in found


@pytest.mark.parametrize("bundled", [True, False])
def test_without_arguments_the_demo_checkpoint_answers(
    capsys, dirs, monkeypatch, tmp_path, bundled
):
    """With its own speculator where that is there; 3 drafts a step, all of them right."""
    monkeypatch.setattr(fastspec, "BUNDLED", tmp_path / "speculator")
    monkeypatch.setattr(fastspec, "demo_checkpoint", lambda: dirs.story)
    if bundled:
        shutil.copytree(dirs.right, fastspec.BUNDLED)
        file = fastspec.BUNDLED / "config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": fastspec.DEMO}
        file.write_text(json.dumps(config))
    code, out, err = run_main(capsys)
    assert (code, out) == (0, STORY + "\n")
    assert figures(err)["tokens per step"] == ("3.50" if bundled else "1.00")
    if bundled:
        code, out, err = run_main(capsys, "--num-draft-tokens", 0)
        assert (code, out) == (0, STORY + "\n")
        assert "no speculator: plain decoding" in err


def test_a_hub_id_that_is_named_is_that_of_the_hub(dirs, monkeypatch, capsys):
    """Also the demo model's, which has a copy elsewhere."""
    asked = []
    monkeypatch.setattr(fastspec, "demo_checkpoint", lambda: asked.append("demo"))
    monkeypatch.setattr(
        fastspec, "local_checkpoint", lambda name, *_: asked.append(name) or dirs.story
    )
    assert printed(capsys, "--checkpoint", fastspec.DEMO, "--prompt", "Q") == STORY + "\n"
    assert asked == [fastspec.DEMO]


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_a_file_of_few_prompts_takes_few_rows(dirs, monkeypatch, tmp_path, capsys, rows):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Q"}\n\n' * rows)
    made, engine = [], fastspec.Engine.__init__

    def spy(*args, **options):
        made.append(options["batch_size"])
        engine(*args, **options)

    monkeypatch.setattr(fastspec.Engine, "__init__", spy)
    argv = ["--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    printed(capsys, "--checkpoint", dirs.story, *argv)
    assert made == [min(rows, 8)]


bundle = pytest.mark.skipif(not fastspec.BUNDLED.is_dir(), reason="no speculator is bundled yet")


@bundle
def test_the_bundled_speculator_travels():
    """Files of at most 16 MiB, 32 MiB in all, with the card and the target's public name."""
    files = list(fastspec.BUNDLED.iterdir())
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 2**24 and sum(sizes) <= 2**25
    assert (fastspec.BUNDLED / "README.md") in files
    assert load_speculator(fastspec.BUNDLED).args.base_model == fastspec.DEMO


@bundle
@pytest.mark.demo
def test_the_bundled_speculator_changes_no_text_and_saves_steps():
    """The steps saved are well below what was measured: one short text varies."""
    options = ["--max-new-tokens", 48, "--dtype", "float32", "--device", "cpu"]
    drafted, plain = run_script(*options), run_script(*options, "--num-draft-tokens", 0)
    assert drafted.returncode == plain.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    assert float(figures(drafted.stderr)["tokens per step"]) > 1.3


def test_revisions_reach_the_hub(capsys, hub):
    argv = ["--checkpoint", "org/story", "--revision", "r1", "--speculator", "org/right"]
    assert printed(capsys, *argv, "--speculator-revision", "r2", "--prompt", "Q") == STORY + "\n"
    assert [options["revision"] for _, options in hub] == ["r1", "r2"]


def run_script(*argv):
    """`python fastspec.py ...` in a process of its own."""
    command = [sys.executable, "fastspec.py", *map(str, argv)]
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, encoding="utf-8")


def test_as_a_script(dirs):
    """Text on stdout and nothing else there, the summary on stderr."""
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.partly, "--prompt", "Q"]
    done = run_script(*argv, "--dtype", "float32", "--device", "cpu")
    assert (done.returncode, done.stdout) == (0, STORY + "\n"), done.stderr
    assert figures(done.stderr)["tokens"] == "21"


@pytest.mark.demo
def test_the_demo_model_speaks_english():
    done = run_script("--max-new-tokens", 16)
    assert done.returncode == 0, done.stderr
    words = re.findall(r"[a-z]+", done.stdout.lower())
    assert len(words) > 7
    assert {"the", "is", "of", "a"} & set(words)
    assert figures(done.stderr)["tokens"] == "16"


# ---- errors ----


def test_a_failed_script_prints_one_line_and_no_traceback(tmp_path):
    done = run_script("--checkpoint", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    where = re.escape(str(tmp_path / "nowhere"))
    assert re.fullmatch(rf"fastspec: {where}: no such directory, [^\n]*\n", done.stderr)


BAD_OPTIONS = {
    "temperature below 0": (["--temperature", -1], "temperature -1.0 is out of range"),
    "top_p 0": (["--top-p", 0], "top_p 0.0 is out of range"),
    "top_k below -1": (["--top-k", -2], "top_k -2 is out of range"),
    "min_p above 1": (["--min-p", 1.1], "min_p 1.1 is out of range"),
    "no new tokens": (["--max-new-tokens", 0], "max_tokens 0 is out of range"),
    "empty stop string": (["--stop", ""], r"stop \[''\] is out of range"),
    "more drafts than heads": (
        ["--num-draft-tokens", 4],
        "cannot draft 4 tokens: speculator .*right has 3 heads",
    ),
    "drafts below 0": (["--num-draft-tokens", -1], "cannot draft -1 tokens"),
    "longer than the model's context": (
        ["--max-seq-len", 129],
        "max_seq_len 129 exceeds the model's context of 128",
    ),
    "cache larger than memory": (
        ["--batch-size", 10**9],
        r"a KV cache of \d{6}\.\d GB do not fit into [\d.]+ GB; max_seq_len and batch_size",
    ),
    "batch below 0": (["--batch-size", -1], "batch.size"),
    "context below 0": (["--max-seq-len", -10], "max.seq.len"),
    "empty prompt": (["--prompt", "Q", ""], "prompt 1 is empty"),
    "prompt beyond the context": (
        ["--prompt", "Q" * 128],
        "prompt 0 has 128 tokens, and max_seq_len 128 leaves no room for an answer",
    ),
    "prompt beyond max_seq_len": (
        ["--prompt", "Q" * 10, "--max-seq-len", 10],
        "prompt 0 has 10 tokens, and max_seq_len 10 leaves no room for an answer",
    ),
    "chat without a template": (["--chat"], "this checkpoint has no chat template; use --no-chat"),
    "profile in no directory": (["--profile", "/nowhere/trace.json"], "/nowhere/trace.json"),
    "checkpoint in no directory": (
        ["--checkpoint", "/nowhere/at/all"],
        r"/nowhere/at/all: no such directory, and not a hub id \(owner/name\)",
    ),
    "speculator in no directory": (["--speculator", "/nowhere/at/all"], "/nowhere/at/all: no such"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_option_is_one_line(capsys, dirs, argv, message):
    """That names the thing: exit code 1, nothing on stdout, no traceback."""
    base = ["--checkpoint", dirs.story, "--speculator", dirs.right]
    assert_one_line(run_main(capsys, *base, *argv), message)


def test_an_error_without_a_speculator_is_one_line_too(capsys, dirs):
    result = run_main(capsys, "--checkpoint", dirs.story, "--prompt", "")
    assert_one_line(result, "prompt 0 is empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so --device cuda works")
def test_a_device_that_is_not_there_is_one_line(capsys, dirs):
    assert_one_line(run_main(capsys, "--checkpoint", dirs.story, "--device", "cuda"), "(?i:cuda)")


def test_a_failure_of_the_hub_is_one_line_of_main(capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    result = run_main(capsys, "--checkpoint", "org/story")
    assert_one_line(result, "org/story: no such directory, and the hub said: no connection")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("story", {"config": {"model_type": "gpt2"}}, "model_type 'gpt2' is not supported"),
        ("story", {"config": {"hidden_size": None}}, "hidden_size is missing"),
        ("right", {"config": {"emb_dim": 64}}, "expects hidden width 64, target .*story has 400$"),
        (
            "right",
            {"config": {"vocab_size": 401}},
            "expects vocabulary 401, target .*story has 400",
        ),
        (
            "right",
            {"config": {"emb_dim": 64, "base_model_name_or_path": "org/large"}},
            "expects hidden width 64, .* has 400; it names org/large as its target",
        ),
        ("right", {"config": {"model_type": "llama"}}, "model_type 'llama' is not a speculator"),
        (
            "story",
            {"generation_config": {"eos_token_id": list(range(10, 27))}},
            "18 end ids; at most 16 are supported",
        ),
        ("story", {"tokenizer_config": {"eos_token": "<none>"}}, "has no token .*<none>"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(capsys, dirs, copy, name, changes, message):
    """Whichever of target (story) and speculator (right) it is."""
    changed = {"story": dirs.story, "right": dirs.right} | {name: copy(name, **changes)}
    argv = ["--checkpoint", changed["story"], "--speculator", changed["right"]]
    assert_one_line(run_main(capsys, *argv), message)


@pytest.mark.parametrize("name", ["story", "right"])
def test_a_directory_without_config_is_one_line(capsys, dirs, copy, name):
    directory = copy(name)
    (directory / "config.json").unlink()
    changed = {"story": dirs.story, "right": dirs.right} | {name: directory}
    argv = ["--checkpoint", changed["story"], "--speculator", changed["right"]]
    assert_one_line(run_main(capsys, *argv), f"{directory}/config.json: no such file")


def test_text_for_a_checkpoint_without_tokenizer_is_one_line(capsys, dirs):
    argv = ["--checkpoint", dirs.bare, "--speculator", dirs.draft]
    message = "this checkpoint has no tokenizer files: give token ids, not text"
    assert_one_line(run_main(capsys, *argv), message)


def test_a_tokenizer_larger_than_the_model_is_one_line(capsys, tmp_path):
    """Its ids beyond the model's vocabulary are refused, not looked up."""
    tiny_llama(tmp_path / "target", vocab_size=97)
    tiny_speculator(tmp_path / "draft", vocab_size=97)
    save_tokenizer(tmp_path / "target")
    argv = ["--checkpoint", tmp_path / "target", "--speculator", tmp_path / "draft"]
    capsys.readouterr()  # of saving
    result = run_main(capsys, *argv, "--prompt", " one")
    assert_one_line(result, r"prompt 0: \d+ is not a token id of 0\.\.96")


def test_nothing_is_read_before_the_checks(capsys, dirs, copy, monkeypatch):
    """What does not fit is found without the weights, which may take minutes to read."""
    monkeypatch.setattr(fastspec, "load_model", lambda *_: pytest.fail("read weights"))
    base = ["--checkpoint", dirs.story, "--speculator"]
    assert run_main(capsys, *base, copy("right", config={"vocab_size": 9}))[0] == 1
    assert run_main(capsys, *base, dirs.right, "--batch-size", 10**9)[0] == 1
    assert run_main(capsys, *base, dirs.right, "--max-seq-len", 129)[0] == 1
    assert run_main(capsys, *base, dirs.right, "--num-draft-tokens", 4)[0] == 1
    assert run_main(capsys, *base, dirs.right, "--prompt", "Q", "Q" * 128)[0] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_tokens": 3}, r"^speculative_config: num_tokens is not supported; supported: model,"),
        ({"method": "eagle"}, r"^speculative_config: method 'eagle' is not 'mlp_speculator'$"),
        ({"model": None}, r"^speculative_config: model is missing$"),
        ({"num_speculative_tokens": 1.5}, r"^[^\n]*1\.5[^\n]*$"),
        ({"num_speculative_tokens": "two"}, r"^[^\n]*two[^\n]*$"),
    ],
)
def test_a_bad_speculative_config_is_refused(dirs, config, message):
    with pytest.raises(ValueError, match=message):
        LLM(dirs.story, {"model": str(dirs.right)} | config)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("model", None, r"^None is neither a directory nor a hub id \(owner/name\)$"),
        ("model", "", r"^'' is neither a directory"),
        ("model", 5, r"^5 is neither a directory"),
        ("speculative_config", "org/right", r"^speculative_config 'org/right' is not a dict with "),
        ("speculative_config", {"model": 5}, r"^5 is neither a directory"),
        ("dtype", None, r"^dtype None is not supported; supported: auto, float32,"),
        ("device", 0.5, r"^device '0.5' is not supported; supported: cpu, cuda, cuda:N$"),
        ("batch_size", None, r"^batch_size None or max_seq_len 128 is out of range"),
        ("max_seq_len", "9", r"^batch_size 1 or max_seq_len 9 is out of range"),
    ],
)
def test_an_argument_of_another_type_is_refused(dirs, argument, value, message):
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": dirs.story, "device": "cpu", "load": False, argument: value})


def test_a_torch_device_is_a_device(dirs):
    assert LLM(dirs.bare, device=torch.device("cpu"), load=False).device.type == "cpu"


def test_a_dict_is_not_taken_for_its_keys(llms):
    encoding = UserDict({"input_ids": [5, 6], "attention_mask": [1, 1]})  # as of transformers
    for prompts in ({"prompt": "Once"}, b"Once", encoding):
        with pytest.raises(ValueError, match=r"^prompts are neither text nor token ids: "):
            llms["plain"].generate(prompts)


@pytest.mark.parametrize("wrong", ["target", "speculator"])
def test_an_error_in_a_config_says_whose_it_is(dirs, tmp_path, wrong):
    pair = {"target": dirs.story, "speculator": dirs.right}
    broken = shutil.copytree(pair[wrong], tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": None}))
    pair[wrong] = broken
    with pytest.raises(ValueError, match=f"^{re.escape(str(broken))}: config.json: vocab_size"):
        LLM(pair["target"], {"model": str(pair["speculator"])}, device="cpu", load=False)


def test_weights_that_are_not_loaded_are_asked_for(dirs):
    with pytest.raises(ValueError, match=r"^the weights are not loaded: call load\(\) first$"):
        LLM(dirs.story, device="cpu", load=False).generate("Once")


def test_numbers_of_numpy_and_torch_are_numbers(llms):
    plain, given = {"seed": 3, "temperature": 0.5, "top_p": 0.75, "top_k": 7}, np.array([5, 6, 7])
    params = SamplingParams(**plain)
    for array in (np.array, torch.tensor):
        settings = {name: array(value)[()] for name, value in plain.items()}
        assert SamplingParams(**settings) == params
    outputs = [
        llms["plain"].generate(prompts, params)[0].outputs[0].token_ids
        for prompts in ([5, 6, 7], given, list(given), [list(given)], list(torch.tensor([5, 6, 7])))
    ]
    assert outputs == [outputs[0]] * 5
    for ids in (np.array([2, 3]), torch.tensor([2, 3]), list(np.array([2, 3]))):
        assert SamplingParams(stop_token_ids=ids).stop_token_ids == (2, 3)
    with pytest.raises(ValueError, match=r"temperature \[0.5, 3.0\] is out of range"):
        SamplingParams(temperature=torch.tensor([0.5, 3]))
    assert SamplingParams(seed=-1).seed is None  # as vLLM takes it


def test_requests_may_come_from_a_generator(llms):
    llm = llms["plain"]
    params = SamplingParams(max_tokens=3)
    requests = [llm.request(p, params, p) for p in ("Once", "There")]
    assert len(list(llm.run(r for r in requests))) == len(list(llm.run(requests))) > 1


@pytest.mark.parametrize("prompts", [None, 5])
def test_prompts_and_messages_of_another_type_are_refused(llms, prompts):
    with pytest.raises(ValueError, match=f"^prompts are neither text nor token ids: {prompts}$"):
        llms["plain"].generate(prompts)
    with pytest.raises(ValueError, match=f"^messages are no list but {prompts}$"):
        llms["plain"].chat(prompts)


@pytest.mark.parametrize("params", [{"temperature": 0}, [None], [{"temperature": 0}], 0.5])
def test_params_of_another_type_are_refused(llms, params):
    message = r"^expected SamplingParams, or a list of them; found "
    with pytest.raises(ValueError, match=message + re.escape(repr(params))):
        llms["plain"].generate("Q", params)


def test_a_bad_dtype_is_refused(dirs):
    message = r"^dtype 'int8' is not supported; supported: auto, float32, float16, bfloat16$"
    with pytest.raises(ValueError, match=message):
        LLM(dirs.story, dtype="int8")


def test_no_row_is_refused(dirs):
    with pytest.raises(ValueError, match=r"batch.size"):
        load(dirs.story, batch_size=0)


@pytest.mark.parametrize("argv", [["--dtype", "int8"], ["--prompt"], ["--seed", "x"], ["--nope"]])
def test_options_that_cannot_be_parsed_exit_with_2(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        fastspec.main(argv)
    assert exit.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(capsys, dirs, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastspec.Engine, "prefill", interrupt)
    code, out, _ = run_main(capsys, "--checkpoint", dirs.story)
    assert (code, out) == (130, "")


# ---- README ----

README = (REPOSITORY / "README.md").read_text("utf-8")


def test_the_example_of_the_readme_runs(dirs, monkeypatch, capsys):
    """As it stands, with its hub ids answered by small checkpoints."""
    checkpoints = {
        "meta-llama/Meta-Llama-3-8B-Instruct": dirs.random,
        "ibm-ai-platform/llama3-8b-accelerator": dirs.draft,
    }
    monkeypatch.setattr(fastspec, "local_checkpoint", lambda name, _: checkpoints[name])
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    printed = capsys.readouterr().out
    assert printed.startswith("The future of AI is ") and len(printed) > 25
    assert names["reply"]


README_COMMANDS = re.findall(
    r"python fastspec\.py((?: [^\n`]*\\\n)*[^\n`]*)\n",
    "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)),
)


@pytest.mark.parametrize("command", README_COMMANDS)
def test_the_commands_of_the_readme_run(dirs, monkeypatch, capsys, tmp_path, command):
    """As they stand, with small checkpoints behind their hub ids and a file of prompts."""

    def local_checkpoint(name, _):
        return dirs.draft if str(name).endswith("-accelerator") else dirs.random

    def end_of_input(_):
        raise EOFError

    monkeypatch.setattr(fastspec, "local_checkpoint", local_checkpoint)
    monkeypatch.setattr(fastspec, "demo_checkpoint", lambda: dirs.random)
    monkeypatch.setattr(fastspec, "BUNDLED", tmp_path / "none")
    monkeypatch.setattr("builtins.input", end_of_input)
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": " one"}\n{"prompt": " two"}\n')
    argv = shlex.split(command.replace("\\\n", " "))
    out = printed(capsys, *argv, "--max-new-tokens", 9)
    if "--prompts" in argv:
        assert len(Path(argv[argv.index("--output") + 1]).read_text().splitlines()) == 2
    elif "--interactive" not in argv:
        assert len(out) > 1


def test_the_readme_has_a_command_of_each_kind():
    kinds = ["--speculator", "--prompt", "--interactive", "--prompts"]
    assert [any(k in c.split() for c in README_COMMANDS) for k in kinds] == [True] * 4
    assert "" in README_COMMANDS


# ---- what users try ----


@pytest.mark.parametrize("as_type", [tuple, torch.tensor, np.array])
def test_ids_may_be_a_tuple_tensor_or_array(dirs, as_type):
    llm, ids = load(dirs.bare), [5, 6, 7]
    expected = llm.generate([ids], greedy())[0].outputs[0].token_ids
    for prompts in (as_type(ids), [as_type(ids)], iter([as_type(ids)])):
        outputs = llm.generate(prompts, greedy())
        assert [o.outputs[0].token_ids for o in outputs] == [expected]


def test_max_tokens_none_fills_the_context(dirs):
    output = load(dirs.bare, max_seq_len=40).generate([[5, 6, 7]], greedy(max_tokens=None))[0]
    assert len(output.outputs[0].token_ids) == 37


def test_a_second_stream_is_refused_while_one_is_read(dirs):
    llm = load(dirs.bare)
    first = llm.stream([[5, 6]], greedy())
    next(first)
    with pytest.raises(ValueError, match="generating already"):
        llm.generate([[7]], greedy())


@pytest.mark.parametrize("device", ["meta", "mps", "gpu", "cuda:99"])
def test_other_devices_are_refused_by_name(capsys, dirs, device):
    code = fastspec.main(["--checkpoint", str(dirs.story), "--device", device])
    err = capsys.readouterr().err
    assert code == 1 and err.startswith("fastspec: device ") and err.count("\n") == 1
    assert device in err


def test_a_revision_of_a_local_directory_is_refused(dirs):
    with pytest.raises(ValueError, match=r"is a directory here: a revision \(v1\) means nothing"):
        load(dirs.story, revision="v1")


def test_no_drafts_are_no_speculator(capsys, dirs):
    argv = ["--checkpoint", dirs.story, "--speculator", dirs.right, "--num-draft-tokens", 0]
    assert fastspec.main([*map(str, argv), "--device", "cpu", "--prompt", "Q"]) == 0
    err = capsys.readouterr().err
    assert "fastspec: no speculator" in err and "speculator           none" in err


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(dirs):
    """The story holds é, € and an emoji; ASCII has none of them."""
    command = [sys.executable, "fastspec.py", "--checkpoint", str(dirs.story), "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--prompt", " one"], **options, check=True)
    assert "five ??? six" in done.stdout
