"""tokenizer.py against `tokenizers`, transformers, sentencepiece and tiktoken, on small tokenizers
trained here."""

import base64
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from conftest import SENTENCES, pieces_and_merges, train_sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from tokenizer import load_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "prefix_space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "whole_text": NO_REGEX,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL]),
    "digit_runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), BYTE_LEVEL]),
    "digits_only": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), NO_REGEX]),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), NO_REGEX]),
    "split_with_gaps": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+|[ \n](?=\p{N})"), "isolated"), NO_REGEX]
    ),
}
TEMPLATE = (
    "{% for m in messages %}\n    {% if m['role'] == 'user' %}\n"
    "{{ bos_token + 'Question: ' + m['content'] }}\n{% else %}\n"
    "{{ 'Answer: ' + m['content'] + eos_token }}\n{% endif %}\n{% endfor %}\n"
    "{{ messages[0] | tojson }}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
ALPHABET = [
    chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")
]
WORDS = ["the", "quick", "don't", "we'll", "I'D", "it's", "naïve", "def", "==>", "3.14"]
WORDS += [
    "日本語",
    "한국어",
    "नमस्ते",
    "مرحبا",
    "🇬🇧",
    "e\u0301",
    "'\u017f",
    "½²\u2167\u0663",
    "👩\u200d👧",
]
SPACES = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u3000", "\xa0", "\x85", "\x1d"]
SPECIAL = ["<|end|>", "<|begin|>", "<|end|", "<tag>"]


def random_text(rng):
    def one():
        kind = rng.randrange(8)
        if kind == 0:
            return rng.choice(ALPHABET)
        if kind == 1:
            return rng.choice(SPACES) * rng.randint(1, 3)
        if kind == 2:
            return str(rng.randrange(10 ** rng.randint(1, 6)))
        if kind == 3:
            return rng.choice(SPECIAL)
        if kind == 4:
            return bytes(rng.choices(range(256), k=rng.randint(1, 9))).decode(errors="replace")
        if kind == 5:
            return bytes(rng.choices(range(128), k=rng.randint(1, 9))).decode()
        return rng.choice(WORDS) + rng.choice(["", " "])

    return "".join(one() for _ in range(rng.randint(0, 20)))


def train(pre_tokenizer=BYTE_LEVEL, vocab_size=700, seed=0):
    """tokenizer.json, as a dict, of a byte-level BPE trained on random text."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(rng) for _ in range(400)], trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def trained():
    return train()


@pytest.fixture
def base(trained):
    """A supported tokenizer.json that a test may change."""
    return json.loads(json.dumps(trained))


def save(directory, data, config=None, **files):
    files = {"tokenizer": data, "tokenizer_config": config or {}} | files
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(directory)


def assert_same(ours, data, count=300, seed=1):
    """ids and text equal to `tokenizers`, with and without special tokens."""
    theirs, rng = Tokenizer.from_str(json.dumps(data)), random.Random(seed)
    for text in ["", " ", *(random_text(rng) for _ in range(count))]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, special) == ids, repr(text)
            assert ours.decode(ids, special) == theirs.decode(ids, special), repr(text)


# ---- ids and text equal those of `tokenizers` ----


@pytest.mark.parametrize("form", PRE_TOKENIZERS)
def test_each_pre_tokenizer_gives_the_ids_of_tokenizers(tmp_path, form):
    data = train(PRE_TOKENIZERS[form])
    assert_same(save(tmp_path, data), data, count=1000)


def test_digits_cut_white_space_like_two_passes(tmp_path):
    """All strings of length 5 over the characters whose order decides where a piece ends."""
    data = train(PRE_TOKENIZERS["digits"])
    ours, theirs = save(tmp_path, data), Tokenizer.from_str(json.dumps(data))
    for n in range(5**5):
        text = "".join(" \n7a!"[n // 5**i % 5] for i in range(5))
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_ids_need_not_be_in_merge_order_and_merges_may_be_pairs_or_strings(tmp_path, base):
    ids = list(base["model"]["vocab"].values())
    random.Random(0).shuffle(ids)
    base["added_tokens"] = []
    base["model"]["vocab"] = dict(zip(base["model"]["vocab"], ids, strict=True))
    base["model"]["merges"] = [" ".join(pair) for pair in base["model"]["merges"]]
    assert_same(save(tmp_path, base), base)


def test_bytes_without_a_token_are_dropped_before_merging(tmp_path, base):
    """The signs around a dropped byte still merge, as in `tokenizers`."""
    vocab = base["model"]["vocab"]
    gone = {byte for byte in "\u0104\u0106\u0113\u011dÃ" if byte in vocab}
    assert "\u0104" in gone
    base["model"]["vocab"] = {t: i for t, i in vocab.items() if not gone & set(t)}
    base["model"]["merges"] = [m for m in base["model"]["merges"] if not gone & set("".join(m))]
    ours = save(tmp_path, base)
    assert_same(ours, base)
    assert ours.encode("=\x04=>") == ours.encode("==>") != ours.encode("=") + ours.encode("=>")


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(tmp_path, base):
    ours = save(tmp_path, base)
    assert ours.decode(ours.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_list_of_merges_gives_the_ids_of_tokenizers(tmp_path, ignore_merges, seed):
    """Merges drawn at random over three letters: several pairs with one result, tokens that their
    own merges never give, merges of parts that are made later."""
    rng = random.Random(seed)
    tokens = {*"abc"} | {"".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(40)}
    pairs = [(t[:i], t[i:]) for t in sorted(tokens) for i in range(1, len(t))]
    pairs = [list(pair) for pair in pairs if tokens.issuperset(pair)]
    rng.shuffle(pairs)
    if seed % 2:  # half of the lists in an order in which parts are made before they are used
        pairs.sort(key=lambda pair: len("".join(pair)))
    data = train(vocab_size=258)
    data["added_tokens"] = []
    data["model"]["vocab"] |= {t: 300 + i for i, t in enumerate(sorted(tokens - set("abc")))}
    data["model"] |= {"merges": pairs[: len(pairs) * 3 // 4], "ignore_merges": ignore_merges}
    ours, theirs = save(tmp_path, data), Tokenizer.from_str(json.dumps(data))
    for _ in range(300):
        text = "".join(rng.choices("abc ", (5, 5, 5, 1), k=rng.randint(1, 14)))
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("merges", [["a a", "a aa"], ["a a", "aa a"], ["a a", "aa a", "aa aa"]])
def test_of_equal_pairs_the_leftmost_merges_first(tmp_path, merges):
    """With only the first list "aaa" is no token of "aaa": the left two merge, (aa, a) does not."""
    data = train(vocab_size=258)
    data["model"]["vocab"] |= {"aa": 300, "aaa": 301, "aaaa": 302}
    data["model"]["merges"] = merges
    ours, theirs = save(tmp_path, data), Tokenizer.from_str(json.dumps(data))
    for n in range(20):
        assert ours.encode("a" * n) == theirs.encode("a" * n).ids


def test_llama3_form_with_all_splits_as_merges(tmp_path):
    """Llama 3's list has every split of each token, sorted by token, and ignore_merges."""
    data = train(PRE_TOKENIZERS["llama3"])
    model, merges = data["model"], []
    for left, right in model["merges"]:
        token = left + right
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [[a, b] for a, b in splits if a in model["vocab"] and b in model["vocab"]]
    assert len(merges) > len(model["merges"])
    # As in Llama 3 the added tokens are not in model.vocab; their ids follow its 700 entries.
    for i, token in enumerate(data["added_tokens"]):
        del model["vocab"][token["content"]]
        token["id"] = 700 + i
    # Tokens that no merge gives: found only as whole pieces.
    model["vocab"] |= {"Ġqqzqq": 5000, "zzjzz": 5001}
    model |= {"merges": merges, "ignore_merges": True}
    ours = save(tmp_path, data)
    assert ours.encode("zzjzz qqzqq zzjzzq")[:2] == [5001, 5000]
    assert_same(ours, data)


def test_added_tokens_honour_their_flags(tmp_path, base):
    flags = [
        {"lstrip": True},
        {"rstrip": True, "special": False},
        {"single_word": True, "normalized": True},
        {"lstrip": True, "rstrip": True, "normalized": True},
        {"special": False, "normalized": True},
        {},
    ]
    contents = ["<tag>", "tag+", "wordy", "<tag> wordy", "two  words", "<tag>more"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, (content, flag) in enumerate(zip(contents, flags, strict=True)):
        token = {"id": 700 + i, "content": content, "special": True} | plain | flag
        assert content not in base["model"]["vocab"]
        base["added_tokens"].append(token)
    ours, theirs = save(tmp_path, base), Tokenizer.from_str(json.dumps(base))
    rng, bits = random.Random(2), [*contents, " ", "  ", "\n", "a", "\u0301", "²", "_", "<tag", "é"]
    for _ in range(3000):
        text = "".join(rng.choices(bits, k=rng.randint(1, 8)))
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)


def test_template_processing_adds_ids_before_and_after(tmp_path, base):
    special = {
        name: {"id": name, "ids": [base["model"]["vocab"][name]], "tokens": [name]}
        for name in ("<|begin|>", "<|end|>")
    }
    one = [{"SpecialToken": {"id": name, "type_id": 0}} for name in special]
    single = [one[0], {"Sequence": {"id": "A", "type_id": 0}}, one[1]]
    template = {"type": "TemplateProcessing", "single": single, "pair": single}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    steps = [byte_level, template | {"special_tokens": special}]
    base["post_processor"] = {"type": "Sequence", "processors": steps}
    ours = save(tmp_path, base, {"add_bos_token": True, "bos_token": "<|end|>"})
    assert_same(ours, base)
    assert ours.encode("") == [special["<|begin|>"]["ids"][0], special["<|end|>"]["ids"][0]]


@pytest.mark.parametrize("bos", ["<|begin|>", {"content": "<|begin|>"}])
def test_add_bos_token_counts_where_there_is_no_post_processor(tmp_path, base, bos):
    ours = save(tmp_path, base, {"add_bos_token": True, "bos_token": bos})
    begin = base["model"]["vocab"]["<|begin|>"]
    assert ours.encode("a") == [begin, *ours.encode("a", add_special_tokens=False)]
    assert save(tmp_path, base, {"bos_token": bos}).encode("a")[0] != begin


def test_random_ids_decode_and_stream_as_tokenizers_decodes(tmp_path, base):
    """Random ids are mostly invalid UTF-8, cut anywhere; some ids name no token."""
    base["added_tokens"].append(base["added_tokens"][0] | {"id": 700, "content": "日 本"})
    ours, theirs = save(tmp_path, base), Tokenizer.from_str(json.dumps(base))
    assert ours.vocab_size == 701
    rng, partial = random.Random(3), 0
    for _ in range(1000):
        ids = rng.choices(range(720), k=rng.randint(0, 40))
        for skip in (True, False):
            stream, texts, rest = ours.stream(skip), [], ids
            while rest:
                cut = rng.randint(1, 4)
                texts.append(stream.push(rest[:cut]))
                rest = rest[cut:]
            tail = stream.finish()
            partial += bool(tail)
            assert "".join(texts) + tail == ours.decode(ids, skip) == theirs.decode(ids, skip)
    assert partial  # some streams did end inside a character


def test_stream_holds_back_half_a_character(tmp_path, base):
    ours = save(tmp_path, base)
    vocab, stream = base["model"]["vocab"], ours.stream()
    pushed = [stream.push([vocab[byte]]) for byte in "ðŁĺĢð"]  # U+1F600 and a half
    assert [*pushed, stream.finish()] == ["", "", "", "\U0001f600", "", "\ufffd"]


def test_a_long_run_without_a_cut_is_read(tmp_path, base):
    """One piece of 200,001 characters: neither the regular expressions nor the merging, which
    reads each piece as a whole, take more than about linear time."""
    ours, text = save(tmp_path, base), " " * 200_000 + "a"
    assert ours.decode(ours.encode(text)) == text


# ---- sentencepiece: tokenizer.model, and tokenizer.json of its kind ----

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.fixture(scope="module")
def llama2():
    return train_sentencepiece()


def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def save_model(directory, model, name="tokenizer.model", **files):
    for file, content in files.items():
        (directory / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(model)
    return load_tokenizer(directory)


PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def metaspace(scheme, split=False):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def llama2_json(model, normalizer=PREPEND, pre_tokenizer=None, strip=True):
    """Llama 2's tokenizer.json for a tokenizer.model."""
    vocab, merges = pieces_and_merges(model)
    special = FLAGS | {"special": True}
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            special | {"id": vocab[t], "content": t} for t in ("<unk>", "<s>", "</s>")
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {"<s>": bos},
        },
        "decoder": {"type": "Sequence", "decoders": DECODERS + [STRIP] * strip},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def test_sentencepiece_model_gives_the_ids_and_text_of_sentencepiece(tmp_path, llama2):
    ours, theirs, rng = save_model(tmp_path, llama2), processor(llama2), random.Random(0)
    assert ours.source == "tokenizer.model (sentencepiece)"
    assert (ours.vocab_size, ours.eos_ids, ours.chat_template) == (420, (2,), None)
    for text in ["", " ", "  a", "▁", "a\0b", *(random_text(rng) for _ in range(1000))]:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, repr(text)
        assert ours.encode(text) == [1, *ids], repr(text)
        assert ours.decode([1, *ids, 2]) == theirs.decode(ids) == text.replace("▁", " ")


def random_streams(ours, ids, rng):
    for continues in (False, True):
        stream, texts, rest = ours.stream(continues=continues), [], ids
        while rest:
            cut = rng.randint(1, 4)
            texts.append(stream.push(rest[:cut]))
            rest = rest[cut:]
        yield "".join(texts) + stream.finish()


def test_random_ids_decode_and_stream_as_sentencepiece_decodes(tmp_path, llama2):
    """Random bytes are mostly invalid UTF-8. Not asked: <0x20> at the start, a byte that
    sentencepiece, unlike `tokenizers`, does not take for the space it put there."""
    ours, theirs, rng = save_model(tmp_path, llama2), processor(llama2), random.Random(1)
    space = theirs.piece_to_id("<0x20>")
    for _ in range(2000):
        ids = rng.choices(range(3, 420), k=rng.randint(1, 12))
        text = theirs.decode(ids)
        if ids[0] != space:
            dropped = " " * theirs.id_to_piece(ids[0]).startswith("▁")
            assert ours.decode([1, *ids]) == text, ids
            assert list(random_streams(ours, ids, rng)) == [text, dropped + text], ids


def test_an_answer_keeps_its_inner_spaces_and_its_first_where_it_continues(tmp_path, llama2):
    ours = save_model(tmp_path, llama2)
    prompt, answer = ours.encode("def  f(x):\n"), processor(llama2).encode("   return  x")
    cases = [
        (prompt + answer, False, "def  f(x):\n    return  x"),
        (answer, False, "   return  x"),
        (answer, True, "    return  x"),  # with the space that sentencepiece put in front
    ]
    for ids, continues, expected in cases:
        stream = ours.stream(continues=continues)
        assert "".join([stream.push([id]) for id in ids]) + stream.finish() == expected
        assert continues or ours.decode(ids) == expected


def test_stream_shows_each_character_of_byte_tokens_as_soon_as_it_is_whole(tmp_path, llama2):
    ours, byte = save_model(tmp_path, llama2), processor(llama2).piece_to_id
    stream = ours.stream()
    pushed = [stream.push([byte(f"<0x{b:02X}>")]) for b in "é😀".encode() + b"\xf0\x9f"]
    assert [*pushed, stream.finish()] == ["", "é", "", "", "", "😀", "", "", "\ufffd\ufffd"]
    assert stream.push(ours.encode("a")) == "a"  # a new text, with a space to drop


SENTENCEPIECE_JSON = {
    "prepend": (PREPEND, None),
    "always": (None, metaspace("always")),
    "first": (None, metaspace("first")),
    "never": (None, metaspace("never")),
    "split": (None, metaspace("first", split=True)),
    "old": (None, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}),
}


@pytest.mark.parametrize("form", SENTENCEPIECE_JSON)
@pytest.mark.parametrize("strip", [True, False])
def test_sentencepiece_json_gives_the_ids_and_text_of_tokenizers(tmp_path, llama2, form, strip):
    data = llama2_json(llama2, *SENTENCEPIECE_JSON[form], strip=strip)
    # Of each kind a token, also such that contain or border on a space.
    for i, (content, normalized) in enumerate(
        [
            ("<sep>", False),
            ("<|end|>", False),
            ("<tag>", True),
            (" the", True),
            ("▁<|begin|>", False),
        ]
    ):
        token = {"id": 420 + i, "content": content, "special": i < 2}
        data["added_tokens"].append(FLAGS | token | {"normalized": normalized, "rstrip": i == 1})
    ours = save(tmp_path, data)
    assert ours.source == "tokenizer.json (sentencepiece BPE)"
    bits = ["<s>", "</s>", " <tag>", "<tag> ", " the", "▁<|begin|>", "<sep>", "▁", "   ", *WORDS]
    theirs, rng = Tokenizer.from_str(json.dumps(data)), random.Random(2)
    for i in range(800):
        text = random_text(rng) if i % 2 else "".join(rng.choices(bits, k=rng.randint(0, 6)))
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, special) == ids, repr(text)
            # tokenizers 0.23 writes a `normalized` token with the space that was matched with it.
            if form != "prepend" or not {422, 423} & {*ids}:
                assert ours.decode(ids, special) == theirs.decode(ids, special), repr(text)


def test_sentencepiece_json_reads_text_as_tokenizer_model_does(tmp_path, llama2):
    ours, theirs, rng = save(tmp_path, llama2_json(llama2)), processor(llama2), random.Random(3)
    for text in ["", " ", *(random_text(rng) for _ in range(500))]:
        assert ours.encode(text) == [1, *theirs.encode(text)], repr(text)


def test_merges_across_a_space_are_kept_together(tmp_path):
    """With tokens like "of▁the" the text is merged as one piece."""
    model = train_sentencepiece(split_by_whitespace=False)
    data = llama2_json(model)
    assert any(
        "▁" in left.lstrip("▁") + "▁" * right.startswith("▁")
        for left, right in data["model"]["merges"]
    )
    ours, theirs, rng = save(tmp_path, data), Tokenizer.from_str(json.dumps(data)), random.Random(4)
    for text in [SENTENCES[0], *(random_text(rng) for _ in range(200))]:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


# A chat and special tokens beside each other: what comes after one gets a space, or does not.
WITH_TOKENS = ["<s>the</s>the", "the<s> the", "<s><s>", "</s>", "the </s>", "a<s>\n<unk>b", "<s"]


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_decides_on_spaces_after_special_tokens_as_in_transformers(tmp_path, llama2, legacy):
    """transformers puts no second space where there is one, sentencepiece does: left out here."""
    vocab, merges = pieces_and_merges(llama2)
    theirs = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    ours = save_model(tmp_path, llama2, tokenizer_config={"legacy": legacy})
    rng = random.Random(5)
    random_texts = ["".join(rng.choices(["<s>", "</s>", *WORDS], k=5)) for _ in range(300)]
    for text in [*(text for text in WITH_TOKENS if "> " not in text), *random_texts]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"legacy": None}, {"legacy": False}])
def test_stretches_between_special_tokens_are_those_of_sentencepiece(tmp_path, llama2, config):
    """Without `"legacy": false` each is read as by itself, else as if in the middle of a text."""
    ours, sp = save_model(tmp_path, llama2, tokenizer_config=config), processor(llama2)
    legacy = config.get("legacy") is not False
    for stretch in ["the", " the", "  x", "\n"]:
        inner = sp.encode(stretch) if legacy else sp.encode("x" + stretch)[len(sp.encode("x")) :]
        assert ours.encode(f"{stretch}</s>{stretch}") == [1, *sp.encode(stretch), 2, *inner]


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": None, "add_eos_token": True}, [1], [2]),
        ({"add_eos_token": True, "eos_token": {"content": "<s>"}}, [1], [1]),
    ],
)
def test_add_bos_token_and_add_eos_token_of_a_model_file(tmp_path, llama2, config, before, after):
    ours = save_model(tmp_path, llama2, tokenizer_config=config)
    assert ours.encode("the") == before + ours.encode("the", add_special_tokens=False) + after


def test_characters_without_bytes_or_token_are_the_unknown_token(tmp_path):
    model = train_sentencepiece(byte_fallback=False, vocab_size=150)
    ours, theirs = save_model(tmp_path, model), processor(model)
    ids = theirs.encode("the 😀 the")
    assert 0 in ids
    assert ours.encode("the 😀 the") == [1, *ids]
    assert ours.decode(ids) == "the  the"


GRANITE = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
GRANITE_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_granite_7b_form_has_added_tokens_and_ends_turns_with_one_of_them(tmp_path, llama2, kind):
    """Its tokens are in added_tokens.json; eos_token is </s>, but turns end with another."""
    added = {token: 420 + i for i, token in enumerate(GRANITE)}
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": GRANITE_TEMPLATE}
    files = {"added_tokens": added, "tokenizer_config": config}
    token_map = {"additional_special_tokens": [{"content": token} for token in GRANITE]}
    if kind == "tokenizer.json":
        ours = save(tmp_path, llama2_json(llama2), config, added_tokens=added)
    else:
        ours = save_model(tmp_path, llama2, special_tokens_map=token_map, **files)
    assert ours.source.startswith(kind)
    assert (ours.eos_ids, ours.vocab_size) == ((2, 420), 425)
    prompt = ours.apply_chat_template([{"role": "user", "content": "the fox"}])
    ids, part = ours.encode(prompt, add_special_tokens=False), processor(llama2).encode
    assert ids == [422, *part("\nthe fox\n"), 423, *part("\n")]
    # Only special_tokens_map.json, here beside tokenizer.model, calls them special.
    assert ours.decode(ids).count("<|user|>") == (kind == "tokenizer.json")
    assert ours.decode(ids, skip_special_tokens=False) == "<|user|> \nthe fox\n<|assistant|> \n"


def test_eos_tokens_of_two_files_both_end_an_answer(tmp_path, llama2):
    files = {"added_tokens": {"<|endoftext|>": 420}, "tokenizer_config": {"eos_token": "</s>"}}
    token_map = {"eos_token": {"content": "<|endoftext|>"}}
    ours = save_model(tmp_path, llama2, special_tokens_map=token_map, **files)
    assert (ours.eos_ids, ours.decode([420, 2])) == ((2, 420), "")


def test_codellama_form_has_infilling_tokens_in_the_model(tmp_path):
    """▁<PRE> and the like are pieces; the configuration makes them special."""
    names = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
    model = train_sentencepiece(user_defined_symbols=names[:2], control_symbols=names[2:])
    config = {"additional_special_tokens": names, "fill_token": "<FILL_ME>", "eot_token": names[3]}
    ours, byname = save_model(tmp_path, model, tokenizer_config=config), processor(model)
    pre, mid, suf, eot = (byname.piece_to_id(name) for name in names)
    assert ours.eos_ids == (2, eot)
    ids = ours.encode("▁<PRE>the▁<SUF>fox▁<MID>", add_special_tokens=False)
    assert ids == [pre, *byname.encode("the"), suf, *byname.encode("fox"), mid]
    assert ours.decode([*ids, eot]) == "the fox"
    assert ours.decode(ids, skip_special_tokens=False) == "<PRE> the <SUF> fox <MID>"


def test_added_tokens_decoder_gives_flags(tmp_path, llama2):
    token = FLAGS | {"content": "<sep>", "rstrip": True, "special": True}
    config = {"added_tokens_decoder": {"420": token}, "sep_token": "<sep>"}
    ours = save_model(tmp_path, llama2, tokenizer_config=config)
    the = processor(llama2).encode("the")
    assert ours.encode("the<sep>  the") == [1, *the, 420, *the]
    assert ours.special_tokens["sep_token"] == "<sep>"


def test_special_tokens_that_only_the_config_names_are_found_in_text(tmp_path, base):
    """As in transformers; tokenizer.json has the token in its vocabulary alone."""
    base["added_tokens"] = base["added_tokens"][:1]
    ours = save(tmp_path, base, {"bos_token": "<|begin|>"})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ["<|begin|>the <|end|>", "a<|begin|> b"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), True)


# ---- tiktoken ranks, and vocab.json with merges.txt ----

BYTE_OF = {c: b for b, c in bytes_to_unicode().items()}


@pytest.fixture(scope="module")
def ranks():
    """{bytes: rank} of a tokenizer with Llama 3's split, the bytes first."""
    data = train(PRE_TOKENIZERS["llama3"])
    tokens = [*BYTE_OF, *("".join(pair) for pair in data["model"]["merges"])]
    tokens += ["Ġqqzqq"]  # that no merge gives: found only as a whole piece
    return {bytes(BYTE_OF[c] for c in t): rank for rank, t in enumerate(dict.fromkeys(tokens))}


def ranks_file(ranks):
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 2: "reserved_special_token_0"}
LLAMA3_SPECIAL |= {5: "reserved_special_token_3", 6: "start_header_id", 7: "end_header_id"}
LLAMA3_SPECIAL |= {8: "reserved_special_token_4", 9: "eot_id", 10: "reserved_special_token_5"}
LLAMA3_SPECIAL |= {255: "reserved_special_token_250"}  # offsets from 128000 in Llama 3's own file


@pytest.mark.parametrize("name", ["tokenizer.model", "original/tokenizer.model"])
def test_tiktoken_ranks_give_the_ids_of_tiktoken(tmp_path, ranks, name):
    n = len(ranks)
    ours = save_model(tmp_path, ranks_file(ranks), name)
    assert ours.source == f"{name} (tiktoken ranks)"
    assert (ours.vocab_size, ours.eos_ids, ours.chat_template) == (n + 256, (n + 1, n + 9), None)
    special = {ours.decode([n + i], False): n + i for i in range(256)}
    assert {i: f"<|{token}|>" for i, token in LLAMA3_SPECIAL.items()}.items() <= {
        id - n: token for token, id in special.items()
    }.items()
    theirs = tiktoken.Encoding("x", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    rng = random.Random(6)
    for _ in range(500):
        text = random_text(rng) + rng.choice([" qqzqq", "<|eot_id|>", "<|start_header_id|> "])
        text += random_text(rng)
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == [n, *ids], repr(text)
        assert ours.decode(ids, False) == theirs.decode(ids)


def test_text_that_tiktoken_cannot_split_is_one_line(tmp_path, ranks):
    """Its regular expressions give up on a million spaces, by a Rust panic."""
    ours = save_model(tmp_path, ranks_file(ranks))
    with pytest.raises(ValueError, match=r"cannot split this text of 1000001 characters") as error:
        ours.encode(" " * 10**6 + "a")
    assert "\n" not in str(error.value) and "run of white space" in str(error.value)
    text = " " * 10**4 + "a"
    assert ours.decode(ours.encode(text)) == text


def test_tiktoken_ranks_give_the_ids_of_transformers_conversion(tmp_path, ranks):
    ours = save_model(tmp_path, ranks_file(ranks))
    theirs = TikTokenConverter(str(tmp_path / "tokenizer.model")).converted()
    rng = random.Random(7)
    for text in (random_text(rng) for _ in range(500)):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text).ids, repr(text)


def test_the_configs_own_special_tokens_replace_llama3s(tmp_path, ranks):
    n, special = len(ranks), FLAGS | {"special": True}
    names = {n: "<|begin_of_text|>", n + 4: "<|finetune_right_pad_id|>", n + 8: "<|eom_id|>"}
    decoder = {str(id): special | {"content": name} for id, name in names.items()}
    config = {"added_tokens_decoder": decoder, "bos_token": names[n], "eos_token": "<|eom_id|>"}
    ours = save_model(tmp_path, ranks_file(ranks), tokenizer_config=config)
    assert (ours.encode("<|eom_id|>"), ours.eos_ids) == ([n, n + 8], (n + 8,))
    assert len(ours.encode("<|eot_id|>")) > 2


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_vocab_and_merges_give_the_ids_of_transformers(tmp_path, base, space, newline):
    vocab = base["model"]["vocab"]
    vocab["<|endoftext|>"] = 700
    lines = ["#version: 0.2", *(" ".join(pair) for pair in base["model"]["merges"]), ""]
    (tmp_path / "merges.txt").write_text(newline.join(lines), encoding="utf-8", newline="")
    config = {"add_prefix_space": space, "pad_token": "<|end|>"}
    added = {"<tag>": 701, "=+=": 702}
    for name, content in [("vocab", vocab), ("tokenizer_config", config), ("added_tokens", added)]:
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert (ours.source, ours.vocab_size) == ("vocab.json (byte-level BPE with merges.txt)", 703)
    assert ours.eos_ids == (700,)
    theirs, rng = GPT2Tokenizer.from_pretrained(tmp_path), random.Random(8)
    for _ in range(300):
        text = random_text(rng) + rng.choice(["", "<|endoftext|>", "=+="]) + random_text(rng)
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


def test_the_first_file_of_the_list_is_read(tmp_path, base, llama2, ranks):
    (tmp_path / "vocab.json").write_text(json.dumps(base["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    sources = [
        save_model(tmp_path, ranks_file(ranks), "original/tokenizer.model").source,
        save_model(tmp_path, llama2).source,
        save(tmp_path, base).source,
    ]
    assert sources == [
        "vocab.json (byte-level BPE with merges.txt)",
        "tokenizer.model (sentencepiece)",
        "tokenizer.json (byte-level BPE)",
    ]


# ---- eos_ids and the end of a turn ----


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}{{ m.content }}<|begin|>{% endfor %}", (0, 1)),
        ("{% for m in messages %}{{ m.content + '\n' + eos_token }}\n{% endfor %}", (0,)),
        ("{% for m in messages %}<|begin|>{{ m.content }}{% endfor %}", (0,)),
        ("{{ messages[0].content }}<|begin|>", (0,)),  # shows no answer
        ("{{ raise_exception('no') }}<|begin|>", (0,)),
    ],
)
def test_the_token_that_the_template_writes_after_an_answer_ends_it(tmp_path, base, template, ends):
    config = {"eos_token": "<|end|>", "chat_template": template}
    assert save(tmp_path, base, config).eos_ids == ends


# ---- tokenizer_config.json and chat templates ----


def test_eos_ids(tmp_path, base):
    end = base["model"]["vocab"]["<|end|>"]
    assert save(tmp_path, base).eos_ids == ()
    assert save(tmp_path, base, {"eos_token": {"content": "<|end|>"}}).eos_ids == (end,)
    assert save(tmp_path, base, special_tokens_map={"eos_token": "<|end|>"}).eos_ids == (end,)


def test_chat_template_renders_as_transformers_does(tmp_path, base):
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    ours = save(tmp_path, base, config)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "<b>é\n"}, {"role": "assistant", "content": "yes"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(chat, prompt) == expected
    assert "<|begin|>Question: <b>é" in expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y') | length }}{{ {'b': '<é>', 'a': [1]} | tojson(indent=2) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if ns.n == 2 %}{% break %}{% endif %}{{ ns.n }}{% endfor %}{{ tools is none }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_template_names_behave_as_in_transformers(tmp_path, base, template):
    ours = save(tmp_path, base, {"chat_template": template})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": str(i)} for i in range(3)]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_where_the_chat_template_is_found(tmp_path, base):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert save(tmp_path, base, {"chat_template": named}).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert save(tmp_path, base, {"chat_template": named}).chat_template == "J"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must alternate$"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ messages[0].absent.absent }}", "UndefinedError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{% set ns = namespace() %}{% set ns.__call__ = 1 %}", "SecurityError: "),
        ("{{ namespace(__call__=1) }}", "SecurityError: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
    ],
)
def test_a_hostile_or_broken_template_is_one_line(tmp_path, base, template, message):
    ours = save(tmp_path, base, {"chat_template": template})
    with pytest.raises(ValueError, match=f"^chat template: {message}") as error:
        ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


def test_no_template_names_the_fix(tmp_path, base):
    with pytest.raises(ValueError, match=r"no default chat template: give plain prompts"):
        save(tmp_path, base).apply_chat_template([])


# ---- what is refused, and how ----


def test_no_tokenizer_file_is_none_and_no_directory_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match=r"/absent: no such directory$"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("name", ["spiece.model", "vocab.txt", "merges.txt"])
def test_another_tokenizer_file_alone_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"a\n")
    with pytest.raises(ValueError, match=f"/{name}: not supported alone; supported: tokenizer.js"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON: "),
        (b"", "not JSON: "),
        (b"[" * 10**5, "not JSON: "),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[]", "holds a JSON list; expected an object"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, base, name, content, message):
    save(tmp_path, base)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"/{name}: {message}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": steps}


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REFUSED = [
    ("model", None, "model is missing; expected an object"),
    ("model.vocab", None, "model.vocab is missing"),
    ("model.merges", None, "model.merges is missing; expected a list"),
    ("model.vocab", [], r"model.vocab is \[\]; supported: an object"),
    ("model.vocab", {}, "model.vocab is empty"),
    ("model.vocab", {"a": -1}, r'model.vocab\["a"\] is -1; supported: an id'),
    ("model.vocab", {"a": 1, "b": 1}, "model.vocab gives one id to two tokens"),
    ("model.merges", [["a", "b", "c"]], r'model.merges\[0\] is \["a", "b", "c"\]; supp'),
    ("model.merges", [7], r"model.merges\[0\] is 7; supported"),
    ("model.merges", ["a "], r'model.merges\[0\] is "a "; supported'),
    ("model.merges", ["qz qz"], r'model.merges\[0\] "qz qz" has a part or a result not in'),
    ("model.type", "Unigram", r'model.type is "Unigram"; supported: "BPE"$'),
    ("model.type", "WordPiece", 'model.type is "WordPiece"'),
    (
        "model.byte_fallback",
        True,
        r"\[normalizer, pre_tokenizer\] is .*Metaspace\] \(byte_fallback",
    ),
    ("model.dropout", 0.1, "model.dropout is 0.1"),
    ("model.end_of_word_suffix", "</w>", 'model.end_of_word_suffix is "</w>"'),
    ("normalizer", {"type": "NFC"}, 'normalizer is {"type": "NFC"}; supported: null'),
    ("decoder", {"type": "Metaspace"}, "decoder is .*; supported: ByteLevel"),
    ("decoder", None, "decoder is null; supported: ByteLevel"),
    ("pre_tokenizer", None, "pre_tokenizer is missing; expected an object"),
    ("pre_tokenizer", {"type": "Metaspace"}, 'pre_tokenizer is "Metaspace"; supported: ByteLev'),
    ("pre_tokenizer", sequence(SPLIT, SPLIT, PLAIN), r'is "Split \+ Split \+ ByteLevel"'),
    ("pre_tokenizer", sequence(SPLIT, {"type": "ByteLevel"}), "use_regex is true; supported: fal"),
    ("pre_tokenizer", sequence(SPLIT, PLAIN | {"add_prefix_space": True}), "add_prefix_space is t"),
    ("pre_tokenizer", sequence(SPLIT | {"behavior": "Removed"}, PLAIN), r'is \["Removed", false\]'),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"Regex": "^a"}}, PLAIN), "pattern is .*comm"),
    (
        "pre_tokenizer",
        sequence(SPLIT | {"pattern": {"Regex": "a{2}+"}}, PLAIN),
        "pattern is .*comm",
    ),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"Regex": "a)"}}, PLAIN), "Split.pattern"),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"String": " "}}, PLAIN), "pattern is .*comm"),
    ("post_processor", {"type": "BertProcessing"}, 'post_processor.type is "BertProcessing"'),
    ("post_processor", "Template", 'post_processor.type is "Template"; supported: TemplateProc'),
    ("added_tokens", 7, "added_tokens is 7; supported: a list"),
    ("pre_tokenizer", {"type": ["ByteLevel"]}, "pre_tokenizer is .*; supported: ByteLevel"),
    ("added_tokens", [{"content": "x"}], r"added_tokens\[0\].id is missing"),
    ("added_tokens", [{"content": "x", "id": 9}], r'\[0\].id 9 of "x" contradicts another token'),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, base, field, value, message):
    *parents, name = field.split(".")
    owner = base
    for parent in parents:
        owner = owner[parent]
    if value is None and field != "decoder":
        del owner[name]
    else:
        owner[name] = value
    with pytest.raises(ValueError, match=f"/tokenizer.json: .*{message}") as error:
        save(tmp_path, base)
    assert "\n" not in str(error.value)


def test_unknown_token_for_missing_bytes_is_refused(tmp_path, base):
    base["model"] |= {"unk_token": "<|end|>", "merges": []}
    del base["model"]["vocab"]["a"]
    with pytest.raises(ValueError, match=r'model.unk_token is "<|end|>"; supported: null where'):
        save(tmp_path, base)


def test_eos_token_without_an_id_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match=r'has no token "</s>", the eos_token of tokenizer_config'):
        save(tmp_path, base, {"eos_token": "</s>"})


# ---- what is refused in other files ----


def test_a_damaged_sentencepiece_model_is_one_line(tmp_path, llama2):
    damaged = [llama2[:cut] for cut in (0, 1, 1000, -5)]
    damaged.append(llama2.replace("▁the".encode(), b"\xff" * 6))  # well formed, but no UTF-8
    for model in damaged:
        with pytest.raises(ValueError, match=r"/tokenizer\.model: neither .* is damaged") as error:
            save_model(tmp_path, model)
        assert "\n" not in str(error.value)


def test_a_pointer_to_a_file_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"/original/tokenizer\.model: neither"):
        save_model(
            tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "original/tokenizer.model"
        )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b" 7\n", b"\n", "line 8 is '.*'; expected base64 and a rank$"),
        (b" 7\n", b" 7 7\n", "line 8 is '"),
        (b" 7\n", b" -7\n", "line 8 is '"),
        (b"== 7\n", b" 7\n", "line 8 is '"),
        (b" 7\n", b" 8\n", r"the ranks of its \d+ lines are not 0 to \d+, once each"),
        (b" 7\n", b" 7000\n", "the ranks of its"),
        (b" 7\n", b" 7\n\n", "line 9 is ''"),
        (b"Kg== ", b"ISEh ", "byte 42 has no rank; expected one for each byte"),
    ],
)
def test_damaged_ranks_are_one_line(tmp_path, ranks, old, new, message):
    data = ranks_file(ranks)
    assert data.count(old) == 1
    with pytest.raises(ValueError, match=rf"/tokenizer\.model: {message}") as error:
        save_model(tmp_path, data.replace(old, new))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({"a": 0}, None, r"/vocab\.json: merges\.txt is missing beside it"),
        ({"a": 0}, b"a \xff\n", r"/merges\.txt: not UTF-8 at byte 2"),
        ([], b"", r"/vocab\.json: holds a JSON list; expected an object"),
        (
            {"a": 0},
            b"#version: 0.2\na b\n",
            r'model\.merges\[1\] "a b" has a part or a result not in',
        ),
        ({"a": 0}, b"ab\n", r'model\.merges\[0\] is "ab"; supported: "left right"'),
        ({"a": 0, "b": 0}, b"", r"vocab\.json \+ merges\.txt: model\.vocab gives one id to two"),
    ],
)
def test_vocab_and_merges_that_do_not_fit_are_one_line(tmp_path, vocab, merges, message):
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    if merges is not None:
        (tmp_path / "merges.txt").write_bytes(merges)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


DECODER = "added_tokens_decoder"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "added_tokens",
            {"<x>": 5},
            r'added_tokens.json\["<x>"\].id 5 of "<x>" contradicts another',
        ),
        ("added_tokens", {"▁the": 420}, "contradicts another token"),
        ("added_tokens", {"<x>": 420, "<y>": 420}, "contradicts another token"),
        ("added_tokens", {"<x>": "7"}, r'\["<x>"\].id is "7"; supported: an integer'),
        ("added_tokens", {"<x>": -1}, "contradicts another token"),
        (
            "tokenizer_config",
            {DECODER: []},
            r"_config.json: added_tokens_decoder is \[\]; supported",
        ),
        (
            "tokenizer_config",
            {DECODER: {"x": {"content": "<x>"}}},
            r'r\["x"\].id is "x"; supported',
        ),
        ("tokenizer_config", {DECODER: {"7": "<x>"}}, r'r\["7"\].content is missing'),
        (
            "tokenizer_config",
            {"additional_special_tokens": 7},
            "additional_special_tokens is 7; sup",
        ),
        (
            "tokenizer_config",
            {"eos_token": "<x>"},
            'has no token "<x>", the eos_token of tokenizer_co',
        ),
        (
            "special_tokens_map",
            {"extra_special_tokens": "x"},
            'map.json: extra_special_tokens is "x',
        ),
        ("special_tokens_map", {"eos_token": "<x>"}, 'has no token "<x>", the eos_token of'),
    ],
)
def test_files_beside_that_do_not_fit_are_one_line(tmp_path, llama2, file, content, message):
    with pytest.raises(ValueError, match=rf"/tokenizer\.model: .*{message}") as error:
        save_model(tmp_path, llama2, **{file: content})
    assert "\n" not in str(error.value)


def test_a_chat_template_that_is_not_utf8_is_named(tmp_path, base):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"/chat_template\.jinja: not UTF-8 at byte 0$"):
        save(tmp_path, base)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("normalizer", {"type": "NFC"}, r"\[normalizer, pre_tokenizer\] is .*Prepend U\+2581"),
        (
            "pre_tokenizer",
            metaspace("first"),
            r"\[normalizer, pre_tokenizer\] is .*; supported: \[",
        ),
        ("decoder", {"type": "ByteLevel"}, r'decoder is .*"ByteLevel".*; supported: Replace'),
        ("decoder", None, "decoder is null; supported: Replace"),
        ("model", {"ignore_merges": True}, "model.ignore_merges is true; supported: false"),
        (
            "model",
            {"vocab": {"a": 0}, "merges": []},
            "model.vocab has no <0x00>; byte_fallback needs",
        ),
    ],
)
def test_sentencepiece_json_of_another_form_is_refused(tmp_path, llama2, field, value, message):
    data = llama2_json(llama2)
    data[field] = data[field] | value if field == "model" else value
    with pytest.raises(ValueError, match=f"/tokenizer.json: {message}") as error:
        save(tmp_path, data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"replacement": "_"}, {"prepend_scheme": "last"}])
def test_another_metaspace_is_refused(tmp_path, llama2, change):
    data = llama2_json(llama2, None, metaspace("first") | change)
    with pytest.raises(ValueError, match=r'pre_tokenizer is .*; supported: U\+2581 before "always'):
        save(tmp_path, data)


def test_imports_without_torch():
    """A process in which importing torch fails can still import tokenizer."""
    code = "import sys; sys.modules['torch'] = None; import tokenizer"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
