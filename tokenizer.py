"""Text to token ids and back, from the tokenizer files of a checkpoint directory.

Reads Hugging Face's `tokenizer.json` and gives the ids that their `tokenizers` library would give.
Supported: byte-level BPE behind ByteLevel (GPT-2), Digits + ByteLevel (StarCoder, SmolLM2, Granite
code) or Split + ByteLevel (Llama 3). Anything else is refused by name rather than tokenized
differently. Also renders chat templates. Needs no torch.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import regex
import tiktoken

# ---- reading fields: every complaint names the field, load_tokenizer adds the file ----

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "a boolean"}


def _unsupported(field: str, found: Any, supported: str) -> NoReturn:
    shown = json.dumps(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ValueError(f"{field} is {shown}; supported: {supported}")


def _field(data: dict, name: str, kind: type, where: str = "") -> Any:
    """data[name], which must be of this JSON kind; `where` prefixes the name in the complaint."""
    if name not in data:
        raise ValueError(f"{where}{name} is missing; expected {_KINDS[kind]}")
    if type(data[name]) is not kind:
        _unsupported(where + name, data[name], _KINDS[kind])
    return data[name]


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}; expected an object")
    return data


# ---- byte-level alphabet: each byte is written in the vocabulary as one printable character ----


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's mapping, from the character in the vocabulary to the Latin-1 one with that byte.

    Printable Latin-1 stands for itself, the other bytes follow from U+0100 on, and Latin-1 that is
    not printable stands for nothing (here: for U+FFFD, which is not Latin-1).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: "\ufffd" for byte in others} | {
        0x100 + i: chr(byte) for i, byte in enumerate(others)
    }


_BYTE_ALPHABET = _byte_alphabet()


def _from_alphabet(token: str) -> bytes | None:
    """The bytes a vocabulary entry stands for, or None where it has some other character."""
    try:
        return token.translate(_BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return None


# ---- byte-pair encoding ----

Merges = dict[tuple[bytes, bytes], int]  # pair -> priority, lowest first
_NEVER = float("inf")


def _merge(piece: bytes, merges: Merges) -> list[bytes]:
    """Byte-pair encoding as `tokenizers` defines it: lowest priority first, leftmost on a tie."""
    parts = [piece[i : i + 1] for i in range(len(piece))]  # b"" once absorbed by the part before
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    pairs = enumerate(pairwise(parts))
    heap = [(merges[pair], i, pair) for i, pair in pairs if pair in merges]
    heapify(heap)
    while heap:
        _, i, pair = heappop(heap)
        j = after[i]
        if j == len(parts) or (parts[i], parts[j]) != pair:
            continue  # an entry made stale by an earlier merge
        parts[i], parts[j], after[i] = pair[0] + pair[1], b"", after[j]
        if after[i] < len(parts):
            before[after[i]] = i
        for k in (before[i], i):
            if k >= 0 and after[k] < len(parts):
                new = (parts[k], parts[after[k]])
                if new in merges:
                    heappush(heap, (merges[new], k, new))
    return [part for part in parts if part]


def _read_vocab(model: dict) -> dict[str, int]:
    vocab = _field(model, "vocab", dict, "model.")
    if not vocab:
        raise ValueError("model.vocab is empty")
    for token, id in vocab.items():
        if type(id) is not int or id < 0:
            _unsupported(f"model.vocab[{json.dumps(token)}]", id, "an id, 0 or more")
    if len(set(vocab.values())) != len(vocab):
        raise ValueError("model.vocab gives one id to two tokens")
    return vocab


def _read_merges(model: dict, bytes_of: dict[str, bytes]) -> Merges:
    merges = {}
    for i, merge in enumerate(_field(model, "merges", list, "model.")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(merge, str) and merge.startswith("#version"):
            continue  # the heading of an old merges.txt
        try:
            left, right = bytes_of[pair[0]], bytes_of[pair[1]]
            bytes_of[pair[0] + pair[1]]
        except (KeyError, TypeError, IndexError):
            _refuse_merge(merge, pair, f"model.merges[{i}]")
        if len(pair) != 2:
            _refuse_merge(merge, pair, f"model.merges[{i}]")
        merges[left, right] = i  # of two equal pairs the later one counts, as in `tokenizers`
    return merges


def _refuse_merge(merge: Any, pair: Any, where: str) -> NoReturn:
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
    if not is_pair or not all(pair):
        _unsupported(where, merge, '"left right" or ["left", "right"]')
    if None in map(_from_alphabet, pair):
        _unsupported(where, merge, "byte-level characters (byte-level BPE)")
    raise ValueError(f"{where} {json.dumps(merge)} has a part or a result not in model.vocab")


@dataclass(frozen=True)
class _BytePairs:
    """Byte-level BPE through tiktoken, where that is the same thing, else through _merge."""

    encoding: tiktoken.Encoding
    splitter: regex.Pattern
    vocab: dict[bytes, int]
    merges: Merges
    whole_first: bool  # ignore_merges: a piece that is itself in the vocabulary is not merged
    ids: list[int]  # by tiktoken rank; the ranks of bytes with no token come after the end
    exact: bool  # tiktoken's merges are these merges

    def encode(self, text: str) -> list[int]:
        ranks = _tiktoken_encode(self.encoding, text) if self.exact else []
        if self.exact and max(ranks, default=0) < len(self.ids):
            return [self.ids[rank] for rank in ranks]
        pieces = (match.group().encode() for match in self.splitter.finditer(text))
        return [id for piece in pieces for id in self.encode_piece(piece)]

    def encode_piece(self, piece: bytes) -> list[int]:
        """A byte with no token is dropped before merging, so its neighbours can still merge."""
        if self.whole_first and piece in self.vocab:
            return [self.vocab[piece]]
        known = bytes(byte for byte in piece if bytes([byte]) in self.vocab)
        return [self.vocab[part] for part in _merge(known, self.merges)]


def _tiktoken_encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    try:
        return encoding.encode_ordinary(text)
    except BaseException as error:
        # A Rust panic (the regex engine's limit, as on a million spaces) is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"text of {len(text)} characters cannot be split: {error}") from None


def _stays_two(pair: tuple[bytes, bytes], merges: Merges, reached: dict) -> bool:
    """Whether merging the pair's bytes by themselves comes to these two parts.

    Follows the parts on both sides of the seam backwards from the pair to single bytes. It fails
    if two of them are listed to merge before either would have grown on its own side; on a tie
    the leftmost goes first.
    """
    (left, right), grow_left, grow_right = pair, _NEVER, _NEVER
    while True:
        (rank_left, split_left), (rank_right, split_right) = reached[left], reached[right]
        across = merges.get((left, right), _NEVER)
        if (left, right) != pair and across < grow_left and across <= grow_right:
            return False
        if rank_left > rank_right:
            grow_left, left = rank_left, split_left[1]
        elif split_right:
            grow_right, right = rank_right, split_right[0]
        else:
            return True


def _reachable(vocab: dict[bytes, int], merges: Merges) -> tuple[dict, bool]:
    """{token: (priority, last pair)} of the tokens that merging can give, in order of priority.

    False beside it: not all of them, as some token is made only from a part that a later merge of
    the list makes. Such pairs for a token that is also made in order never come to be used.
    """
    reached = {token: (-1, None) for token in vocab if len(token) == 1}
    skipped = []
    for pair, priority in sorted(merges.items(), key=itemgetter(1)):
        if pair[0] not in reached or pair[1] not in reached:
            skipped.append(pair)
        elif (token := pair[0] + pair[1]) not in reached and _stays_two(pair, merges, reached):
            reached[token] = (priority, pair)
    missed = (pair for pair in skipped if pair[0] + pair[1] not in reached)
    return reached, not any(left in reached and right in reached for left, right in missed)


def _splits(token: bytes, reached: dict) -> Iterator[tuple[bytes, bytes]]:
    pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
    return ((left, right) for left, right in pairs if left in reached and right in reached)


def _byte_pairs(model: dict, pattern: str) -> _BytePairs:
    """tiktoken ranks the merged bytes, a merges list ranks pairs; here is why both agree.

    A merge inside a span depends on that span alone until a merge crosses its ends. So a token t
    appears in some text only if merging t by itself gives t, and then always out of the same last
    pair. Hence: rank every such t by the priority of that pair, leave out the tokens that merging
    never gives, and at every step tiktoken (any neighbours whose bytes have a rank) and a merges
    list (listed pairs) have the same candidates in the same order, whatever other pairs are listed
    for t. tiktoken looks a whole piece up before merging, which for these t gives the same.

    With ignore_merges the left-out tokens must be found as whole pieces, so they get the highest
    ranks. tiktoken could also merge two neighbours into such a token, but only if merging it by
    itself stops at two parts. If there is one, or _reachable misses some, _merge does the work.
    """
    entries = _read_vocab(model)
    bytes_of = {token: _from_alphabet(token) for token in entries}
    bytes_of = {token: spelled for token, spelled in bytes_of.items() if spelled}
    vocab = {spelled: entries[token] for token, spelled in bytes_of.items()}
    merges = _read_merges(model, bytes_of)
    reached, exact = _reachable(vocab, merges)
    whole_first = bool(model.get("ignore_merges"))
    whole = [token for token in vocab if token not in reached] if whole_first else []
    if exact:
        pairs = (pair for token in whole for pair in _splits(token, reached))
        exact = not any(_stays_two(pair, merges, reached) for pair in pairs)
    ranked = [*reached, *whole]
    # tiktoken needs a rank for every byte; text that uses one of these goes through _merge.
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in vocab]
    if missing and model.get("unk_token"):
        _unsupported("model.unk_token", model["unk_token"], "null where bytes have no token")
    ranks = {token: rank for rank, token in enumerate(ranked + missing)}
    encoding = tiktoken.Encoding(
        "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    ids = [vocab[token] for token in ranked]
    return _BytePairs(encoding, regex.compile(pattern), vocab, merges, whole_first, ids, exact)


# ---- pre-tokenizers: how text is cut into pieces before merging, as one regular expression ----

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+"
_GPT2 = rf"{_WORDS}| ?\p{{N}}+|{_REST}|\s+(?!\S)|\s+"
# Syntax that means the same to the regular expression engines involved (^ $ . and {2}+ do not).
_ESCAPE = r"\\(?:[pP]\{\w+\}|[sSdrnt]|\W)"
_PORTABLE = regex.compile(
    rf"(?!.*[\d,]\}}\+)(?:{_ESCAPE}|\[\^?(?:{_ESCAPE}|[^\\\[\]&])+\]"
    r"|\(\?(?:i?:|!|=)|[^\\\[\]^$.(]|\((?!\?))+"
)


def _digits_pattern(step: dict, use_regex: bool) -> str:
    single = _field(step, "individual_digits", bool, "pre_tokenizer Digits.")
    digits = r"\p{N}" if single else r"\p{N}+"
    if not use_regex:
        return rf"{digits}|\P{{N}}+"
    # Digits are cut off first, so white space before one ends its piece: hence the third-last case.
    return rf"{_WORDS}|{digits}|{_REST}|\s+(?=\p{{N}})|\s+(?!\S)|\s+"


def _compiles(pattern: str) -> bool:
    try:
        return bool(regex.compile(pattern))
    except regex.error:
        return False


def _split_pattern(step: dict, use_regex: bool) -> str:
    pattern = _field(step, "pattern", dict, "pre_tokenizer Split.").get("Regex")
    if not isinstance(pattern, str) or not _PORTABLE.fullmatch(pattern) or not _compiles(pattern):
        _unsupported("pre_tokenizer Split.pattern", step["pattern"], "a Regex in common syntax")
    if step.get("behavior") != "Isolated" or step.get("invert"):
        found = [step.get("behavior"), step.get("invert")]
        _unsupported("pre_tokenizer Split.[behavior, invert]", found, '["Isolated", false]')
    if use_regex:
        _unsupported("pre_tokenizer ByteLevel.use_regex", True, "false after Split")
    # Text between two matches is a piece of its own; tiktoken alone would drop it.
    return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"


_PATTERNS: dict[tuple, Callable[[dict, bool], str]] = {
    ("ByteLevel",): lambda step, use_regex: _GPT2 if use_regex else r"[\s\S]+",
    ("Digits", "ByteLevel"): _digits_pattern,
    ("Split", "ByteLevel"): _split_pattern,
}


def _pre_tokenizer(data: dict) -> tuple[str, bool]:
    """The pattern of the pieces, and whether a space goes before text that has none."""
    step = _field(data, "pre_tokenizer", dict)
    in_sequence = step.get("type") == "Sequence"
    steps = _field(step, "pretokenizers", list, "pre_tokenizer.") if in_sequence else [step]
    kinds = tuple(str(step.get("type")) if isinstance(step, dict) else "?" for step in steps)
    if kinds not in _PATTERNS:
        names = ", ".join(" + ".join(names) for names in _PATTERNS)
        _unsupported("pre_tokenizer", " + ".join(kinds), names)
    byte_level = steps[-1]
    prefix_space = bool(byte_level.get("add_prefix_space"))
    if prefix_space and len(steps) > 1:
        _unsupported("pre_tokenizer ByteLevel.add_prefix_space", True, f"false after {kinds[0]}")
    return _PATTERNS[kinds](steps[0], byte_level.get("use_regex", True)), prefix_space


# ---- added tokens: found in the text before anything else ----

_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
_SPACES = regex.compile(f"[{_WHITE}]*")


@dataclass(frozen=True)
class _AddedTokens:
    """Tokens by content, and what finds them: leftmost first, then longest."""

    tokens: dict[str, dict]
    finder: regex.Pattern

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: ids of added tokens, and the stretches between them."""
        done = 0
        for match in self.finder.finditer(text):
            token, (start, stop) = self.tokens[match.group()], match.span()
            if token.get("single_word") and _touches_word(text, start, stop):
                continue
            if token.get("lstrip"):
                start = done + len(text[done:start].rstrip(_WHITE))
            if token.get("rstrip"):
                stop = _SPACES.match(text, stop).end()
            if done < start:
                yield text[done:start]
            yield token["id"]
            done = stop
        if done < len(text):
            yield text[done:]


def _touches_word(text: str, start: int, stop: int) -> bool:
    return bool((start > 0 and _WORD.match(text, start - 1)) or _WORD.match(text, stop))


def _read_added(data: dict, vocab: dict[str, int]) -> list[dict]:
    token_of = {id: token for token, id in vocab.items()}
    tokens = _field(data, "added_tokens", list) if data.get("added_tokens") is not None else []
    for i, token in enumerate(tokens):
        where = f"added_tokens[{i}]."
        content = _field(token if isinstance(token, dict) else {}, "content", str, where)
        id = _field(token, "id", int, where)
        if vocab.get(content, id) != id or token_of.setdefault(id, content) != content or id < 0:
            raise ValueError(f"{where}id {id} of {json.dumps(content)} contradicts another token")
    return [token for token in tokens if token["content"]]


def _added_stages(tokens: list[dict]) -> list[_AddedTokens]:
    """Tokens marked `normalized` are looked for only in what the others leave."""
    stages = []
    for normalized in (False, True):
        mine = {t["content"]: t for t in tokens if bool(t.get("normalized")) == normalized}
        longest_first = sorted(mine, key=len, reverse=True)
        if mine:
            finder = regex.compile("|".join(map(regex.escape, longest_first)))
            stages.append(_AddedTokens(mine, finder))
    return stages


# ---- post-processor: ids put before and after the text ----


def _template_ids(step: dict) -> tuple[list[int], list[int]]:
    """Ids before and after the one text of a TemplateProcessing step."""
    known = _field(step, "special_tokens", dict, "post_processor.")
    around = ([], [])
    seen_text = False
    for item in _field(step, "single", list, "post_processor."):
        name = item.get("SpecialToken", {}).get("id") if isinstance(item, dict) else None
        if isinstance(name, str) and isinstance(known.get(name), dict):
            around[seen_text].extend(_field(known[name], "ids", list, "post_processor "))
        elif item == {"Sequence": {"id": "A", "type_id": 0}} and not seen_text:
            seen_text = True
        else:
            _unsupported("post_processor.single", item, "known special tokens around one text")
    return around


def _post_processor(step: dict | None) -> tuple[list[int], list[int]] | None:
    """Ids before and after the text; None where no step says anything about them."""
    kind = step.get("type") if isinstance(step, dict) else step
    if kind in (None, "ByteLevel"):
        return None
    if kind == "TemplateProcessing":
        return _template_ids(step)
    if kind != "Sequence":
        _unsupported("post_processor.type", kind, "TemplateProcessing, ByteLevel or a Sequence")
    steps = map(_post_processor, _field(step, "processors", list, "post_processor."))
    found = [ids for ids in steps if ids is not None]
    if len(found) > 1:
        raise ValueError("post_processor has two TemplateProcessing steps; supported: one")
    return found[0] if found else None


# ---- chat templates ----


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace(), but a template cannot plant Python's own `__names__` on it."""

    def __init__(*args, **kwargs):  # no `self`: a template may use that name
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with _")
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks what the assistant wrote, for training; here it only renders."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike Jinja's own filter this does not escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def _compile_template(source: str) -> jinja2.Template:
    """Compile in a sandbox with the names that templates written for transformers expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def _read_chat_template(directory: Path, config: dict) -> str | None:
    """chat_template.jinja if there, else tokenizer_config.json's own or the one named default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((x.get("template") for x in named if x.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        _unsupported("tokenizer_config.json: chat_template", template, "a string, or named ones")
    return template


_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _read_special_tokens(config: dict, token_map: dict) -> dict[str, str]:
    """{"bos_token": ..., ...} of the checkpoint; each may be a string or an AddedToken object."""
    tokens = {}
    for name in (f"{role}_token" for role in _ROLES):
        value = config.get(name) or token_map.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


# ---- the tokenizer ----


class TextStream:
    """Text of ids that arrive in batches: what push and finish return, joined, is the decode of
    all of them. A character whose bytes are still incomplete is held back until they are."""

    def __init__(self, token_bytes: dict[int, bytes]):
        self.token_bytes = token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        return self.decoder.decode(b"".join(self.token_bytes.get(id, b"") for id in ids))

    def finish(self) -> str:
        """What was held back, as U+FFFD; the stream is empty again afterwards."""
        return self.decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Tokenizer:
    """Made by load_tokenizer. `eos_ids` and `chat_template` are those of the tokenizer's files."""

    encode_text: Callable[[str], list[int]]  # of text in which no added token is to be found
    added: list[_AddedTokens]
    around: tuple[list[int], list[int]]  # ids before and after the text
    token_bytes: dict[int, bytes]
    text_bytes: dict[int, bytes]  # the same without special tokens
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return max(self.token_bytes) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of the text; added tokens written out in it become their ids.

        Half of a surrogate pair, which no UTF-8 can hold, is read as U+FFFD. ValueError: text that
        the regular expression engine gives up on, such as a million spaces in a row.
        """
        parts: list[str | int] = [_without_surrogates(text)] if text else []
        for stage in self.added:
            parts = [
                x for part in parts for x in (stage.split(part) if type(part) is str else [part])
            ]
        ids = [
            i for part in parts for i in (self.encode_text(part) if type(part) is str else [part])
        ]
        return [*self.around[0], *ids, *self.around[1]] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids. Invalid UTF-8 gives U+FFFD, an id that names no token gives nothing."""
        stream = self.stream(skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        return TextStream(self.text_bytes if skip_special_tokens else self.token_bytes)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The prompt for these {"role": ..., "content": ...} messages.

        The template writes bos itself, so encode the result with add_special_tokens=False.
        ValueError: there is no template, or it failed, or it refused the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no default chat template: give plain prompts instead of"
                " messages, or put a chat_template.jinja beside its tokenizer.json"
            )
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            template = _compile_template(self.chat_template)
            return template.render(**self.special_tokens, **given, tools=None, documents=None)
        except Exception as error:  # a template is a program, so it can raise anything
            reason = " ".join(str(error).split())
            raise ValueError(f"chat template: {type(error).__name__}: {reason}") from None


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- loading ----

_MODEL_DEFAULTS = {
    "type": (None, "BPE"),  # older files name no type
    "byte_fallback": (None, False),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "dropout": (None, 0),
}
_OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer.tiktoken")


def _check_supported(data: dict) -> None:
    model = _field(data, "model", dict)
    for name, supported in _MODEL_DEFAULTS.items():
        if model.get(name) not in supported:
            _unsupported(
                f"model.{name}", model[name], f"{json.dumps(supported[1])} (byte-level BPE)"
            )
    if data.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        _unsupported("normalizer", data["normalizer"], "null")
    decoder = data.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        _unsupported("decoder", decoder, "ByteLevel")


def _text_encoder(data: dict) -> Callable[[str], list[int]]:
    pattern, prefix_space = _pre_tokenizer(data)
    encode = _byte_pairs(data["model"], pattern).encode
    if not prefix_space:
        return encode
    return lambda text: encode(text if text.startswith(" ") else " " + text)


def _around(data: dict, ids: dict[str, int], config: dict, tokens: dict[str, str]) -> tuple:
    """tokenizer.json's post_processor decides; only where it is silent does add_bos_token."""
    around = _post_processor(data.get("post_processor"))
    bos = tokens.get("bos_token")
    if around is None and config.get("add_bos_token") and bos in ids:
        around = ([ids[bos]], [])
    return around or ([], [])


def _eos_ids(ids: dict[str, int], tokens: dict[str, str]) -> tuple[int, ...]:
    eos = tokens.get("eos_token")
    if eos is None:
        return ()
    if eos not in ids:
        raise ValueError(f"has no token {json.dumps(eos)}, the eos_token of tokenizer_config.json")
    return (ids[eos],)


def _from_tokenizer_json(data: dict, directory: Path, config: dict, token_map: dict) -> Tokenizer:
    _check_supported(data)
    encode_text = _text_encoder(data)
    vocab = data["model"]["vocab"]
    added = _read_added(data, vocab)
    ids = vocab | {token["content"]: token["id"] for token in added}
    special = {token["id"] for token in added if token.get("special")}
    tokens = _read_special_tokens(config, token_map)
    # As in `tokenizers`, an added token too is read in the byte alphabet if all of it is in there.
    token_bytes = {id: _from_alphabet(token) or token.encode() for token, id in ids.items()}
    return Tokenizer(
        encode_text=encode_text,
        added=_added_stages(added),
        around=_around(data, ids, config, tokens),
        token_bytes=token_bytes,
        text_bytes={id: text for id, text in token_bytes.items() if id not in special},
        special_tokens=tokens,
        eos_ids=_eos_ids(ids, tokens),
        chat_template=_read_chat_template(directory, config),
    )


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None if it has no tokenizer file at all.

    Reads tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json and
    chat_template.jinja. ValueError, in one line naming file and field: the directory is missing,
    a file is malformed, or the tokenizer is of a kind that is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [name for name in _OTHER_FILES if (directory / name).is_file()]
        if not others:
            return None
        raise ValueError(f"{directory / others[0]}: not supported without a tokenizer.json")
    data = _read_json(path)
    beside = (directory / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    config, token_map = (_read_json(file) if file.is_file() else {} for file in beside)
    try:
        return _from_tokenizer_json(data, directory, config, token_map)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
