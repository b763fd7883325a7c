"""Files of prompts, and how well the rows of a batch are kept busy."""

import json
import re
from collections import deque

import pytest
from conftest import (
    STORY,
    assert_one_line,
    greedy,
    load,
    run_main,
)

import fastspec
from fastspec import Engine, Request, SamplingParams, decode_loop

# ---- rows kept busy ----


def requests_of(lengths):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
    return [Request([5 + i % 50, 7], p, 0, []) for i, p in enumerate(params)]


def share_of_work(engine, lengths):
    """Tokens per step and row, while requests wait: the last ones leave rows empty in any order."""
    step, requests, steps, tokens = engine.step, deque(requests_of(lengths)), 0, 0

    def counting(*flags):
        nonlocal steps, tokens
        packet = step(*flags)
        if requests:
            steps, tokens = steps + 1, tokens + int(engine.result[:, 0].sum())
        return packet

    engine.step = counting
    taken = (requests.popleft() for _ in lengths)
    emitted = sum(len(event.tokens) for event in decode_loop(engine, taken, (False, False)))
    engine.step = step
    assert emitted == sum(lengths)
    return tokens / steps / engine.batch_size


@pytest.mark.parametrize("name", [None, "partly", "right"])
def test_mixed_lengths_run_at_the_rate_of_equal_ones(dirs, name):
    """At least 0.9 of it, in tokens per step and row. Each request leaves its row idle for the one
    step that is queued when its end is read, in both files; a batch that waited for its longest
    row would reach about half. With no drafts, drafts that are right at times, and right ones."""
    lengths = [5 + (i * 37) % 97 for i in range(48)]
    mean = sum(lengths) // len(lengths)
    engine = load(dirs.story, name and getattr(dirs, name), batch_size=4).engine
    engine.ahead = 1  # as on a GPU
    mixed, equal = (share_of_work(engine, these) for these in (lengths, [mean] * 48))
    assert equal > (1.5 if name else 0.9)
    assert mixed >= 0.9 * equal


@pytest.mark.parametrize("ahead", [0, 1])
def test_all_free_rows_are_refilled_before_the_next_step(model, ahead):
    """Rows that end together are filled together."""
    engine, launched = Engine(model, batch_size=3, max_seq_len=64), []
    engine.ahead = ahead
    prefill, step = engine.prefill, engine.step
    engine.prefill = lambda *args: launched.append("p") or prefill(*args)
    engine.step = lambda *flags: launched.append("s") or step(*flags)
    list(decode_loop(engine, requests_of([6] * 9)))
    assert re.fullmatch(r"(psssssss*){3}", "".join(launched))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_wide_batch_waits_for_an_eighth_of_its_rows(model, ahead):
    """Of 32 rows one ends in each step, so four are refilled after every fourth one; the
    last time only three requests are left. Each answer is what its prompt alone gets."""
    engine, launched = Engine(model, batch_size=32, max_seq_len=64), []
    engine.ahead = ahead
    prefill, step = engine.prefill, engine.step
    engine.prefill = lambda rows, *rest: launched.append(str(len(rows))) or prefill(rows, *rest)
    engine.step = lambda *flags: launched.append("s") or step(*flags)
    requests = requests_of([*range(1, 33), *[40] * 11])
    tokens = [[] for _ in requests]
    for event in decode_loop(engine, requests):
        tokens[event.request] += event.tokens
    assert "".join(launched).startswith("32" + "s" * ahead + "ssss4" * 2 + "ssss3s")
    assert launched.count("s") == 4 * 3 + 40 + 2 * ahead  # the last one's 40, and what is drained
    alone = Engine(model, batch_size=1, max_seq_len=64)
    expected = [[] for _ in requests]
    for event in decode_loop(alone, requests):
        expected[event.request] += event.tokens
    assert tokens == expected


@pytest.mark.parametrize("ahead", [0, 1])
def test_requests_are_taken_as_rows_come_free(dirs, ahead):
    """One more than there are rows at most: a long file is not held in memory."""
    llm, taken, ended = load(dirs.bare, batch_size=3), 0, 0
    llm.engine.ahead = ahead

    def requests():
        nonlocal taken
        for request in requests_of([3 + i % 7 for i in range(20)]):
            taken += 1
            yield request

    for _, _, output in llm.run(requests(), (False, False)):
        ended += output is not None
        assert taken - ended <= 3 + 1
    assert taken == ended == 20


# ---- files ----


@pytest.fixture
def files(tmp_path):
    """A file of prompts that is written from its lines, and the path of its output."""

    def write(*lines):
        texts = (line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines)
        lines = (text if isinstance(text, bytes) else text.encode() for text in texts)
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
        return ["--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]

    return write


def rows_in(argv):
    text = argv[-1].read_text("utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


ROWS = [
    {"id": "a", "prompt": "Q", "max_tokens": 20},
    {"prompt": " two", "stop": [" six"]},
    {"id": 7, "prompt": [50], "max_tokens": 1},
    {"prompt": " nine", "seed": 3, "temperature": 1.0, "top_k": 5},
    {"id": "é", "prompt": "Q", "stop_token_ids": [0], "ignore_eos": True, "max_tokens": None},
]


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_file_of_prompts(capsys, dirs, files, rows):
    """Answers in the order of the rows, each by its own settings, where it has any."""
    argv = files(*ROWS)
    options = ["--checkpoint", dirs.story, "--speculator", dirs.partly, "--max-new-tokens", 19]
    code, out, err = run_main(capsys, *options, *argv, "--batch-size", rows)
    found = rows_in(argv)
    assert (code, out) == (0, ""), err
    assert [row["id"] for row in found] == ["a", 2, 7, 4, "é"]
    texts = [STORY, STORY[len(" one two") : STORY.index(" six")], " one", " ten", STORY]
    assert [row["text"] for row in found] == texts
    reasons = ["length", "stop", "length", "stop", "stop"]
    assert [row["finish_reason"] for row in found] == reasons
    llm = load(dirs.story)
    settings = [{k: v for k, v in row.items() if k not in ("id", "prompt")} for row in ROWS]
    params = [greedy(**({"max_tokens": 19} | s)) for s in settings]
    for row, output in zip(found, llm.generate([r["prompt"] for r in ROWS], params), strict=True):
        assert row["token_ids"] == output.outputs[0].token_ids
        assert row["prompt_tokens"] == len(output.prompt_token_ids)
    assert found[2]["steps"] == 1 < found[0]["steps"] < 20
    assert re.search(r"^tokens/s +[\d.]+ per sequence, [\d.]+ in all$", err, re.MULTILINE)


def test_prompts_and_messages_of_a_file_are_turned_into_ids_as_elsewhere(capsys, dirs, files):
    """A prompt that is text becomes a user's turn as --prompt does, ids stay, messages render."""
    llm, params = load(dirs.random), greedy(max_tokens=9)
    turn, ids = [{"role": "user", "content": " one"}], [9, 8, 7]
    more = [*turn, {"role": "assistant", "content": "x"}, *turn]
    argv = files({"prompt": " one"}, {"messages": more}, {"prompt": ids})
    base = ["--checkpoint", dirs.random, "--max-new-tokens", 9, *argv]
    assert run_main(capsys, *base)[0] == 0
    outputs = [*llm.chat([turn, more], params), *llm.generate([ids], params)]
    assert [r["token_ids"] for r in rows_in(argv)] == [o.outputs[0].token_ids for o in outputs]
    argv[-1].unlink()
    assert run_main(capsys, *base, "--no-chat")[0] == 0
    outputs[:1] = llm.generate(" one", params)
    assert [r["token_ids"] for r in rows_in(argv)] == [o.outputs[0].token_ids for o in outputs]


def test_sampled_and_filtered_rows_after_greedy_ones(capsys, dirs, files):
    """What the steps need is known before the rows are read: ids are those of each row alone."""
    settings = [
        {"temperature": 0},
        {"temperature": 1.2, "seed": 1},
        {"temperature": 1.2, "seed": 2, "top_k": 4},
        {"temperature": 0, "top_p": 0.5},
        {"temperature": 0.9, "seed": 3, "top_p": 0.7, "min_p": 0.05},
    ]
    rows = [{"prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": True} | s for s in settings]
    argv = files(*rows)
    options = ["--checkpoint", dirs.bare, "--speculator", dirs.draft, "--batch-size", 1]
    assert run_main(capsys, *options, *argv)[0] == 0
    llm = load(dirs.bare)
    for row, found in zip(rows, rows_in(argv), strict=True):
        prompt, params = row.pop("prompt"), SamplingParams(**row)
        assert found["token_ids"] == llm.generate([prompt], params)[0].outputs[0].token_ids
        assert found["text"] == "" and len(found["token_ids"]) == 20


BAD_ROWS = {
    "cut off": ('{"prompt": "Q"', "not JSON: Expecting ',' delimiter at column 15"),
    "no JSON": ("prompt", "not JSON: Expecting value at column 1"),
    "not UTF-8": (b'{"prompt": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 12"),
    "nested without end": ("[" * 200_000, ".*while decoding"),
    "a list": ("[1, 2]", "expected a JSON object, found list"),
    "no prompt": ({"id": 1}, "expected either prompt or messages"),
    "both": ({"prompt": "Q", "messages": []}, "expected either prompt or messages"),
    "unknown key": (
        {"prompt": "Q", "max_token": 3},
        "'max_token' is not supported; supported: id, prompt, messages, temperature, top_p",
    ),
    "id": ({"id": [1], "prompt": "Q"}, r"id \[1\] is neither text nor an integer"),
    "number as prompt": ({"prompt": 5}, "the prompt is neither text nor token ids: 5"),
    "no text": ({"prompt": ""}, "the prompt is empty"),
    "null": ({"prompt": None}, "the prompt is neither text nor token ids: None"),
    "id beyond": ({"prompt": [1, 400]}, r"the prompt: 400 is not a token id of 0\.\.399"),
    "too long": ({"prompt": "Q" * 128}, "the prompt has 128 tokens, and max_seq_len 128 leaves no"),
    "messages": ({"messages": "Q"}, "the conversation is not a list of messages but str"),
    "no template": (
        {"messages": [{"role": "user", "content": "Q"}]},
        "this checkpoint has no default chat template",
    ),
    "temperature": ({"prompt": "Q", "temperature": -1}, ".*temperature -1 is out of range"),
    "nan": ('{"prompt": "Q", "temperature": NaN}', ".*temperature nan is out of range"),
    "max_tokens": ({"prompt": "Q", "max_tokens": "9"}, ".*max_tokens '9' is out of range"),
    "stop": ({"prompt": "Q", "stop": 5}, ".*stop 5 is out of range"),
    "stop ids": ({"prompt": "Q", "stop_token_ids": 5}, ".*stop_token_ids 5 is out of range"),
    "ignore_eos": ({"prompt": "Q", "ignore_eos": "no"}, ".*ignore_eos 'no' is out of range"),
    "seed": ({"prompt": "Q", "seed": True}, ".*seed True is out of range"),
    "too many ends": (
        {"prompt": "Q", "stop_token_ids": list(range(17))},
        "the prompt: 17 end ids; at most 16 are supported, the model.s own among them: give fewer",
    ),
}


def test_bad_rows_are_named_by_their_line_and_the_others_run(capsys, dirs, files):
    """One line on stderr for each, the exit code 1, and every good row between them is answered."""
    lines, good = [], {"prompt": "Q", "max_tokens": 2}
    for row, _ in BAD_ROWS.values():
        lines += [good, "", row]  # an empty line is no row, but counts as a line
    argv = files(*lines)
    code, out, err = run_main(capsys, "--checkpoint", dirs.story, *argv)
    assert (code, out) == (1, "")
    said = [line for line in err.splitlines() if line.startswith(f"fastspec: {argv[1]}:")]
    *said, last = said
    for number, (line, (_, message)) in enumerate(zip(said, BAD_ROWS.values(), strict=True)):
        assert re.match(rf"fastspec: {argv[1]}:{3 * number + 3}: {message}", line), line
    count = len(BAD_ROWS)
    assert last == f"fastspec: {argv[1]}: {count} of {2 * count} rows were not run"
    found = rows_in(argv)
    assert [row["id"] for row in found] == list(range(1, 3 * count, 3))
    assert {row["text"] for row in found} == {" one two"}


@pytest.mark.parametrize("lines", [[], ["", " "], ["{", {"prompt": 1}]])
def test_a_file_without_a_good_row_ends_before_the_weights(capsys, dirs, files, lines, monkeypatch):
    monkeypatch.setattr(fastspec, "load_model", lambda *_: pytest.fail("read weights"))
    code, out, err = run_main(capsys, "--checkpoint", dirs.story, *(argv := files(*lines)))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"fastspec: {argv[1]}: no row to run"


def test_the_mark_at_the_start_of_a_windows_file_and_its_line_ends(capsys, dirs, files):
    line = json.dumps({"prompt": "Q", "max_tokens": 1}).encode()
    argv = files(b"\xef\xbb\xbf" + line + b"\r", line + b"\r", b"\r")
    assert run_main(capsys, "--checkpoint", dirs.story, *argv)[0] == 0
    assert [row["text"] for row in rows_in(argv)] == [" one"] * 2


def test_an_id_that_utf_8_cannot_hold_comes_back(capsys, dirs, files):
    """Half of a surrogate pair, and characters that some programs take for line ends."""
    ids = ["\ud83d", "\u2028\x85\x00\n", "日本"]
    argv = files(*({"id": id, "prompt": "Q", "max_tokens": 1} for id in ids))
    assert run_main(capsys, "--checkpoint", dirs.story, *argv)[0] == 0
    assert [row["id"] for row in rows_in(argv)] == ids
    assert "日本" in argv[-1].read_text("utf-8")


def test_answers_are_written_as_they_come(tmp_path):
    """Each line is in the file, whole, when the next output is asked for."""
    path = tmp_path / "out.jsonl"

    def outputs():
        for i in range(3):
            assert path.read_text().count("\n") == i
            answer = fastspec.CompletionOutput("x" * 10 ** (2 * i), [1], "stop")
            yield fastspec.RequestOutput(None, [2], [answer], request_id=i)

    assert len(list(fastspec.write_answers(path, outputs(), 3))) == 3


@pytest.mark.parametrize("at", [1, 12, 30])
def test_an_interrupted_run_keeps_whole_lines(capsys, dirs, files, monkeypatch, at):
    """Those that a run to the end begins with."""
    rows = [{"prompt": [i], "max_tokens": 3 + (i * 5) % 9} for i in range(5, 20)]
    base = ["--checkpoint", dirs.bare, "--batch-size", 2]
    argv = files(*rows)
    assert run_main(capsys, *base, *argv)[0] == 0
    whole = rows_in(argv)
    argv[-1].unlink()
    step, steps = Engine.step, []

    def interrupted(self, *flags):
        steps.append(1)
        if len(steps) == at:
            raise KeyboardInterrupt
        return step(self, *flags)

    monkeypatch.setattr(Engine, "step", interrupted)
    code, _, err = run_main(capsys, *base, *argv)
    assert code == 130 and "Traceback" not in err
    kept = rows_in(argv)
    assert kept == whole[: len(kept)] and len(kept) < len(whole)
    assert bool(kept) is (at > 1)


def test_an_output_that_holds_something_is_not_overwritten(capsys, dirs, files):
    argv = files({"prompt": "Q"})
    argv[-1].write_text("precious\n")
    result = run_main(capsys, "--checkpoint", dirs.story, *argv)
    assert_one_line(result, "out.jsonl: not empty; name another file, or delete this one")
    assert argv[-1].read_text() == "precious\n"
    result = run_main(capsys, "--checkpoint", dirs.story, *argv[:-1], argv[1])
    assert_one_line(result, "in.jsonl: not empty; name another file")


def test_an_empty_output_is_used(capsys, dirs, files):
    argv = files({"prompt": "Q"})
    argv[-1].touch()
    assert run_main(capsys, "--checkpoint", dirs.story, *argv)[0] == 0
    assert rows_in(argv)[0]["text"] == STORY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "in.jsonl"], "--prompts and --output need each other"),
        (["--output", "out.jsonl"], "--prompts and --output need each other"),
        (["--prompts", "/nowhere/x", "--output", "out.jsonl"], "/nowhere/x: no such file"),
        (["--prompts", "/dev/null", "--output", "out.jsonl"], "/dev/null: no such file"),
        (["--prompts", "a", "--output", "b", "--prompt", "Q"], "goes without --prompt"),
        (["--prompts", "a", "--output", "b", "--interactive"], "and --interactive"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(capsys, dirs, options, message):
    assert_one_line(run_main(capsys, "--checkpoint", dirs.story, *options), message)


def test_an_output_that_cannot_be_written_is_one_line(capsys, dirs, files, monkeypatch):
    monkeypatch.setattr(fastspec, "load_model", lambda *_: pytest.fail("read weights"))
    argv = files({"prompt": "Q"})
    result = run_main(capsys, "--checkpoint", dirs.story, *argv[:-1], "/nowhere/out.jsonl")
    assert_one_line(result, "/nowhere/out.jsonl")


# ---- the target of a speculator ----


def test_a_speculator_alone_brings_the_target_its_config_names(capsys, dirs, copy):
    speculator = copy("right", config={"base_model_name_or_path": str(dirs.story)})
    code, out, err = run_main(capsys, "--speculator", speculator, "--prompt", "Q")
    assert (code, out) == (0, STORY + "\n")
    assert f"fastspec: the target is {dirs.story}, which {speculator} is for\n" in err


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("ibm-ai-platform/llama2-70b-accelerator", "meta-llama/Llama-2-70b-chat-hf"),
        ("ibm-fms/llama2-70b-accelerator", "meta-llama/Llama-2-70b-chat-hf"),
        ("ibm-ai-platform/codellama-34b-accelerator", "codellama/CodeLlama-34b-Instruct-hf"),
        (
            "ibm-granite/granite-20b-code-instruct-accelerator",
            "ibm-granite/granite-20b-code-instruct",
        ),
    ],
)
def test_a_published_speculator_alone_brings_its_target(capsys, dirs, monkeypatch, name, target):
    """Also where its config does not say it."""
    checkpoints = {name: dirs.right, target: dirs.story}
    monkeypatch.setattr(fastspec, "local_checkpoint", lambda name, _: checkpoints[str(name)])
    code, out, _ = run_main(capsys, "--speculator", name, "--prompt", "Q")
    assert (code, out) == (0, STORY + "\n")


def test_a_directory_named_as_the_published_speculator_is_taken_for_it(dirs, tmp_path):
    (directory := tmp_path / "llama3-8b-accelerator").symlink_to(dirs.right)
    target = fastspec.target_of(str(directory), None)
    assert target == "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize("base", [None, "", 5, ["org/a"]])
def test_a_speculator_alone_that_names_no_target_is_one_line(capsys, copy, base):
    speculator = copy("right", config={"base_model_name_or_path": base})
    result = run_main(capsys, "--speculator", speculator)
    assert_one_line(result, f"{speculator}: its config.json does not name a target; give --check")


def test_a_target_is_not_taken_for_a_speculator(capsys, dirs):
    result = run_main(capsys, "--speculator", dirs.story)
    assert_one_line(result, f"{dirs.story}: its model_type is 'llama', that of no speculator")


def test_the_checkpoint_that_is_given_counts(capsys, dirs, copy):
    speculator = copy("right", config={"base_model_name_or_path": "org/other"})
    argv = ["--checkpoint", dirs.story, "--speculator", speculator, "--prompt", "Q"]
    assert run_main(capsys, *argv)[:2] == (0, STORY + "\n")
