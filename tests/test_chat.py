"""Conversations: what the cache holds is not computed again, and no text changes for it."""

import io
import signal

import pytest
import torch
from conftest import (
    ANSWER,
    END,
    STORY,
    TEMPLATE,
    USER,
    assert_one_line,
    greedy,
    load,
    printed,
    run_main,
)

import fastspec
from fastspec import LLM, Engine, Request, SamplingParams, decode_loop
from model import load_model
from speculator import load_speculator

# ---- the engine ----

FIRST = [5, 6, 7, 8, 9, 10, 11]  # the prompt of a first turn


@pytest.fixture(scope="module")
def modules(llama_dir, speculator_dir):
    return load_model(llama_dir), load_speculator(speculator_dir)


@pytest.fixture(params=[0, 3], ids=["plain", "speculative"])
def make_engine(modules, request):
    """Makes engines that note in `computed` the slots (start, stop) of their prefills."""

    def make(**options):
        engine = Engine(*modules, num_draft_tokens=request.param, max_seq_len=128, **options)
        engine.ahead, engine.computed = 1, []
        prefill_chunk = engine.prefill_chunk

        def noting(tokens, start, *rest):
            engine.computed.append((start, start + tokens.shape[1]))
            return prefill_chunk(tokens, start, *rest)

        engine.prefill_chunk = noting
        return engine

    return make


def ask(engine, prompt, count=12, cancel=False, goes_on=True):
    """`count` tokens after a prompt; with `cancel`, the request is ended by the host there."""
    params = SamplingParams(temperature=0, max_tokens=50 if cancel else count)
    tokens = []
    for event in decode_loop(engine, [Request(prompt, params, 0, [], goes_on=goes_on)]):
        tokens += event.tokens
        event.cancel = cancel and len(tokens) >= count
    return tokens[:count]


def assert_fresh(make_engine, prompt, tokens):
    """The tokens are those of an engine that has done nothing else."""
    assert tokens == ask(make_engine(), prompt, len(tokens))


def other(token):
    return (token + 1) % 97


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("sizes", [(64,), (4, 8)], ids=["one chunk", "chunks"])
def test_later_turns_compute_only_what_is_new(make_engine, monkeypatch, sizes, batch_size):
    """From the last token of the answer on, whose keys and values no step has cached yet, to the
    last but one of the prompt: the step caches the last itself."""
    monkeypatch.setattr(fastspec, "PREFILL_SIZES", sizes)
    engine, prompt, cached = make_engine(batch_size=batch_size), FIRST, 0
    for turn in range(4):
        engine.computed.clear()
        answer = ask(engine, prompt)
        assert_fresh(make_engine, prompt, answer)
        slots = [slot for chunk in engine.computed for slot in range(*chunk)]
        assert slots == list(range(cached, len(prompt) - 1))
        cached = len(prompt) + len(answer) - 1
        prompt = [*prompt, *answer, 20 + turn, 30, 31, 32, 33, 34, 35, 36, 37, 38]


@pytest.mark.parametrize("said", [1, 2, 5, 6])
def test_after_an_answer_that_was_stopped(make_engine, said):
    """The steps went further than what was shown: the cache counts up to what is shared."""
    engine = make_engine()
    whole = ask(make_engine(), FIRST, 20)
    shown = ask(engine, FIRST, said, cancel=True)
    assert shown == whole[:said]
    held = int(engine.length[0]) - 1
    prompt = [*FIRST, *shown, other(whole[said]), 1, 2, 3]
    engine.computed.clear()
    assert_fresh(make_engine, prompt, ask(engine, prompt))
    assert engine.computed == [(min(held, len(FIRST) + said), len(prompt) - 1)]
    assert held > len(FIRST)


def test_after_a_run_that_was_closed(make_engine):
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=50)
    events = decode_loop(engine, [Request(FIRST, params, 0, [], goes_on=True)])
    shown = [token for _ in range(3) for token in next(events).tokens]
    events.close()
    prompt = [*FIRST, *shown, 1, 2, 3]
    engine.computed.clear()
    assert_fresh(make_engine, prompt, ask(engine, prompt))
    assert engine.computed[0][0] >= len(FIRST) + len(shown) - 1


def test_a_prompt_that_the_cache_holds_whole(make_engine):
    """The token before its last is computed again: the hidden state there is in no cache. A
    prompt of one token has none, so that its own is."""
    engine = make_engine()
    answer = ask(engine, FIRST)
    for prompt in (FIRST, FIRST[:3], FIRST[:1], FIRST, [*FIRST, *answer[:4]]):
        ask(engine, [*FIRST, *answer])
        engine.computed.clear()
        assert_fresh(make_engine, prompt, ask(engine, prompt))
        start = max(len(prompt) - 2, 0)
        assert engine.computed == [(start, start + 1)]


def test_another_prompt_shares_what_it_has_in_common(make_engine):
    engine = make_engine()
    ask(engine, FIRST)
    for prompt, common in (
        ([other(FIRST[0]), *FIRST], 0),
        ([other(FIRST[0]), *FIRST[:2], 90, 91], 3),
        (FIRST, 0),
        ([*FIRST[:4], 90, 91], 4),
    ):
        engine.computed.clear()
        assert_fresh(make_engine, prompt, ask(engine, prompt))
        assert engine.computed == [(common, len(prompt) - 1)]


def test_only_a_request_that_goes_on_reuses_anything(make_engine):
    """And what other requests left in the row counts, whoever they were."""
    engine = make_engine()
    answer = ask(engine, FIRST)
    for goes_on, start in ((False, 0), (True, len(FIRST) - 2)):
        engine.computed.clear()
        assert ask(engine, FIRST, goes_on=goes_on) == answer
        assert engine.computed == [(start, len(FIRST) - 1)]


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_an_interrupt_inside_a_prefill_leaves_no_wrong_claim(make_engine, monkeypatch, chunks):
    """The chunks before it overwrote slots of the conversation that was there."""
    monkeypatch.setattr(fastspec, "PREFILL_SIZES", (4, 8))
    engine = make_engine()
    prompt = [*FIRST, *ask(engine, FIRST, 30)]
    chunk = engine.prefill_chunk

    def failing(tokens, start, *rest):
        if start == 3 + 8 * chunks:
            raise KeyboardInterrupt
        return chunk(tokens, start, *rest)

    engine.prefill_chunk = failing
    with pytest.raises(KeyboardInterrupt):
        ask(engine, [*FIRST[:3], *range(60, 90)])
    engine.prefill_chunk = chunk
    assert_fresh(make_engine, prompt, ask(engine, prompt))


@pytest.mark.parametrize("then", ["what was there", "the same again"])
@pytest.mark.parametrize(("sizes", "chunks"), [((64,), 1), ((4, 8), 3), ((4, 8), 6)])
def test_an_interrupt_while_several_rows_are_filled(make_engine, monkeypatch, sizes, chunks, then):
    """After the one chunk of both rows, or inside the four of the first or of the second: neither
    slots that were overwritten nor slots not reached count for a later request."""
    monkeypatch.setattr(fastspec, "PREFILL_SIZES", sizes)
    engine = make_engine(batch_size=2)
    prompts = [[*FIRST, *range(20, 40)], [*FIRST[::-1], *range(50, 70)]]
    params = SamplingParams(temperature=0, max_tokens=5)
    list(decode_loop(engine, [Request(prompt, params, 0, []) for prompt in prompts]))
    new = [[9, *prompt] for prompt in prompts]
    chunk = engine.prefill_chunk
    engine.computed.clear()

    def failing(*args):
        hidden = chunk(*args)
        if len(engine.computed) == chunks:
            raise KeyboardInterrupt
        return hidden

    engine.prefill_chunk = failing
    with pytest.raises(KeyboardInterrupt):
        list(decode_loop(engine, [Request(prompt, params, 0, []) for prompt in new]))
    assert engine.done.all()
    engine.prefill_chunk = chunk
    prompts, answers = new if then == "the same again" else prompts, [[], []]
    again = [Request(prompt, params, 0, [], goes_on=True) for prompt in prompts]
    for event in decode_loop(engine, again):
        answers[event.request] += event.tokens
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_fresh(make_engine, prompt, answer)


def test_rows_that_go_on_and_fresh_ones_are_filled_at_once(make_engine):
    """In any order; a row that goes on but shares nothing is one of the fresh ones."""
    engine = make_engine(batch_size=4)
    params = SamplingParams(temperature=0, max_tokens=9)
    old = [[*FIRST, row] for row in range(4)]
    list(decode_loop(engine, [Request(prompt, params, 0, []) for prompt in old]))
    new = [[1, 2], [*old[1], 5, 6, 7], [other(FIRST[0]), *FIRST, 8], [*old[3], 3, 3]]
    engine.computed.clear()
    answers = [[] for _ in new]
    goes_on = [False, True, True, False]
    requests = [Request(p, params, 0, [], goes_on=g) for p, g in zip(new, goes_on, strict=True)]
    for event in decode_loop(engine, requests):
        answers[event.request] += event.tokens
    # Row 1 from where its prompt ended, then the three others together.
    assert engine.computed == [(len(old[1]), len(new[1]) - 1), (0, len(new[3]) - 1)]
    for prompt, answer in zip(new, answers, strict=True):
        assert_fresh(make_engine, prompt, answer)


def test_sampled_turns_are_those_of_a_fresh_run(make_engine):
    """The noise depends on seed and position alone."""
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=15)

    def sample(engine, prompt):
        events = decode_loop(engine, [Request(prompt, params, 3, [], goes_on=True)])
        return [token for event in events for token in event.tokens]

    engine = make_engine()
    prompt = [*FIRST, *sample(engine, FIRST), 1, 2]
    assert sample(engine, prompt) == sample(make_engine(), prompt)
    assert engine.computed[-1] == (len(prompt) - 3, len(prompt) - 1)


def test_a_conversation_up_to_the_last_slot(make_engine):
    """An answer that fills the cache, then one that is cut inside it."""
    engine = make_engine()
    answer = ask(engine, FIRST, 121)
    assert len(FIRST) + len(answer) == 128
    prompt = [*FIRST, *answer][:-1]
    assert_fresh(make_engine, prompt, ask(engine, prompt, 1))


# ---- LLM.chat ----


@pytest.fixture
def talking(copy):
    """The checkpoint of the story, with a chat template."""
    return copy("story", tokenizer_config={"chat_template": TEMPLATE})


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_chat_answers_one_conversation_or_several(dirs):
    """As generate does for the ids of the rendered template."""
    llm = load(dirs.random, dirs.draft, batch_size=2)
    several = [[user(" one"), assistant(" two"), user(" three")], [user(" four")], [user("x")]]
    encode = llm.tokenizer.encode
    ids = [
        [USER, *encode(" one"), ANSWER, *encode(" two"), END, USER, *encode(" three"), ANSWER],
        [USER, *encode(" four"), ANSWER],
        [USER, *encode("x"), ANSWER],
    ]
    params = [greedy(max_tokens=n) for n in (7, 8, 9)]
    expected = [o.outputs[0] for o in llm.generate(ids, params)]
    outputs = llm.chat(several, params)
    assert [o.outputs[0] for o in outputs] == expected
    assert [o.prompt_token_ids for o in outputs] == ids
    assert outputs[1].prompt == "<|user|> four<|answer|>"
    assert [o.outputs[0] for o in llm.chat(several[0], params[0])] == expected[:1]
    assert [o.outputs[0] for o in llm.chat(several[:1], params[0])] == expected[:1]
    assert llm.chat([]) == []


def test_chat_stream_gives_pieces(dirs):
    llm = load(dirs.random, dirs.draft, batch_size=2)
    several = [[user(" four")], [user(" five six")]]
    texts = [o.outputs[0].text for o in llm.chat(several, greedy(max_tokens=9))]
    parts = list(llm.chat_stream(several, greedy(max_tokens=9)))
    streamed = ["".join(piece for i, piece, _ in parts if i == index) for index in (0, 1)]
    assert streamed == texts and len(parts) > 4


@pytest.mark.parametrize(("stop", "kept"), [(None, 20), (" four", 3), ("ve é", 4)])
def test_turns_of_a_conversation_go_on_in_the_cache(dirs, talking, stop, kept):
    """Also after a stop string, which the steps overrun and the conversation does not hold: what
    is `kept` of the answer are the tokens that its text gives again (not "fi" of " five")."""
    llm, messages, held = load(talking, dirs.partly), [], 0
    prefill_chunk, starts = llm.engine.prefill_chunk, []

    def noting(tokens, start, *rest):
        starts.append(start)
        return prefill_chunk(tokens, start, *rest)

    llm.engine.prefill_chunk = noting
    for turn in ("Q", "and?", "Q"):
        messages += [user(turn)]
        output = llm.chat(messages, greedy(stop=stop))[0]
        out, prompt = output.outputs[0], output.prompt_token_ids
        assert out.text == (STORY[: STORY.index(stop)] if stop else STORY)
        assert starts == [held]
        starts.clear()
        held, messages = len(prompt) + kept, [*messages, assistant(out.text)]


def test_a_conversation_equals_its_fresh_runs(dirs):
    """Text of a random model, turn by turn; bytes that are no UTF-8 come back as other tokens, so
    that not all of an answer is found in the cache."""
    llm = load(dirs.random, dirs.draft)
    messages = []
    for turn in (" one", " two three", "x"):
        messages += [user(turn)]
        output = llm.chat(messages, greedy(max_tokens=15))[0].outputs[0]
        assert output == load(dirs.random).chat(messages, greedy(max_tokens=15))[0].outputs[0]
        messages += [assistant(output.text)]


def test_a_chat_stops_at_every_end_id(dirs, copy):
    """Also at one that only generation_config.json names, as chat models' often is."""
    six = load(dirs.story).tokenizer.encode(" six")
    directory = copy(
        "story",
        tokenizer_config={"chat_template": TEMPLATE},
        generation_config={"eos_token_id": [END, *six]},
    )
    out = load(directory).chat([user("Q")], greedy())[0].outputs[0]
    assert (out.text, out.finish_reason) == (STORY[: STORY.index(" six")], "stop")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "conversation 0 is not a list of messages but str"),
        (user("Q"), "conversation 0 is not a list of messages but str"),
        ([[]], "conversation 0 has no messages"),
        ([[user("Q")], "Q"], "conversation 1 is not a list of messages but str"),
        ([{"content": "Q"}], "conversation 0: message 0 has no role that is text"),
        ([user("Q"), {"role": "user"}], "conversation 0: message 1 has no content that is text"),
        ([user(["Q"])], "conversation 0: message 0 has no content that is text"),
        ([user("Q"), "Q"], "conversation 0: message 1 has no role that is text"),
        ([user("Q" * 300)], "conversation 0 has 302 tokens, and max_seq_len 256 leaves no room"),
    ],
)
def test_messages_of_another_shape_are_refused(dirs, messages, message):
    llm = load(dirs.random, load=False)
    with pytest.raises(ValueError, match=f"^{message}"):
        llm.chat_stream(messages, greedy())


def test_a_chat_needs_a_template(dirs):
    with pytest.raises(ValueError, match=r"^this checkpoint has no default chat template"):
        load(dirs.story, load=False).chat([user("Q")])
    with pytest.raises(ValueError, match=r"has no tokenizer files: give token ids, not messages$"):
        load(dirs.bare, load=False).chat([user("Q")])


# ---- --interactive ----


@pytest.fixture
def asked(monkeypatch):
    """Copies of the conversations that LLM.chat_stream was given."""
    conversations, chat_stream = [], LLM.chat_stream

    def noting(self, messages, params):
        conversations.append(list(messages))
        return chat_stream(self, messages, params)

    monkeypatch.setattr(LLM, "chat_stream", noting)
    return conversations


@pytest.fixture
def typed(monkeypatch):
    """Puts lines on standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_conversation_at_the_terminal(capsys, talking, dirs, asked, typed):
    """stdout carries the answers alone; empty lines are no turns; /exit ends it."""
    typed("Q\n\n  \nhow so?\n/exit\nnot read\n")
    argv = ["--checkpoint", talking, "--speculator", dirs.partly, "--interactive"]
    code, out, err = run_main(capsys, *argv)
    assert (code, out) == (0, f"{STORY}\n{STORY}\n")
    assert asked == [[user("Q")], [user("Q"), assistant(STORY), user("how so?")]]
    assert "/reset starts over" in err and "tokens               42\n" in err


def test_the_end_of_the_input_ends_it(capsys, talking, typed):
    for text, out in (("", ""), ("Q", STORY + "\n"), ("Q\n", STORY + "\n")):
        typed(text)
        assert printed(capsys, "--checkpoint", talking, "--interactive") == out


def test_prompts_are_the_first_turns(capsys, talking, asked, typed):
    typed("last\n")
    argv = ["--checkpoint", talking, "--interactive", "--max-new-tokens", 2]
    assert printed(capsys, *argv, "--prompt", "a", "b") == " one two\n" * 3
    assert asked[-1][::2] == [user("a"), user("b"), user("last")]
    assert printed(capsys, *argv, "--prompt", "a", "/exit", "b") == " one two\n"


def test_reset_starts_over(capsys, talking, asked, typed):
    typed("Q\n/reset\nP\n")
    printed(capsys, "--checkpoint", talking, "--interactive")
    assert asked == [[user("Q")], [user("P")]]


def test_a_conversation_beyond_the_context_says_how_to_go_on(capsys, talking, asked, typed):
    """The turn that does not fit is not kept."""
    typed("Q\n" + "x" * 30 + "\nP\n/reset\n" + "x" * 30 + "\n")
    argv = ["--checkpoint", talking, "--interactive", "--max-seq-len", 48]
    code, out, err = run_main(capsys, *argv)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[0] == STORY and STORY.startswith(lines[1].rstrip("\ufffd"))
    expected = "max_seq_len 48 leaves no room for an answer; /reset starts over"
    (line,) = [line for line in err.splitlines() if "leaves no room" in line]
    assert line.startswith("fastspec: conversation 0 has ") and line.endswith(expected)
    assert [len(messages) for messages in asked] == [1, 3, 3, 1]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    capsys, talking, dirs, asked, typed, monkeypatch
):
    """Wherever the engine is at that moment; the next answers are whole again."""
    typed("Q\nP\nR\n")
    step, steps = Engine.step, []

    def interrupted(self, *flags):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *flags)

    monkeypatch.setattr(Engine, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    argv = ["--checkpoint", talking, "--speculator", dirs.right, "--interactive"]
    lines = printed(capsys, *argv).splitlines()
    said = lines[0]
    assert STORY.startswith(said) and 0 < len(said) < len(STORY)
    assert lines[1:] == [STORY] * 2
    assert asked[1] == [user("Q"), assistant(said), user("P")]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_typing_is_not_the_end(capsys, talking, monkeypatch):
    lines = iter([KeyboardInterrupt, "Q", KeyboardInterrupt, EOFError])

    def read(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert printed(capsys, "--checkpoint", talking, "--interactive") == STORY + "\n"


def test_a_conversation_needs_a_template_before_the_weights(capsys, dirs, monkeypatch):
    monkeypatch.setattr(fastspec, "load_model", lambda *_: pytest.fail("read weights"))
    result = run_main(capsys, "--checkpoint", dirs.story, "--interactive")
    assert_one_line(result, "this checkpoint has no chat template; --interactive needs one")
    result = run_main(capsys, "--checkpoint", dirs.random, "--interactive", "--no-chat")
    assert_one_line(result, "--interactive needs the chat template: leave out --no-chat")


def test_the_cache_on_the_device_is_what_is_compared(modules):
    """A fresh engine holds nothing, not even a prompt of zeros."""
    engine = Engine(*modules, max_seq_len=64)
    assert engine.cached_prefix(0, torch.zeros(9, dtype=torch.int64)) == 0
