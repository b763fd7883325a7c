"""Text to token ids and back, from the tokenizer files of a checkpoint directory.

The first of these that is there is read, and `Tokenizer.source` names it:

1. `tokenizer.json`, giving the ids that Hugging Face's `tokenizers` would give (with add_bos_token
   of tokenizer_config.json, if the file has no post-processor that adds one). Byte-level BPE
   behind ByteLevel (GPT-2), Digits + ByteLevel (StarCoder, SmolLM2, Granite code) or Split +
   ByteLevel (Llama 3); or sentencepiece's BPE of characters with bytes for the rest (Llama 2,
   CodeLlama, Granite 7B), where the file itself says which stretches of text get a space in front.
2. `tokenizer.model`, told apart by content: a sentencepiece model or tiktoken ranks as Meta writes
   them for Llama 3, each through the library of that name.
3. `vocab.json` with `merges.txt`, as GPT-2 reads them.
4. `original/tokenizer.model`, like 2.

tokenizer_config.json, special_tokens_map.json and added_tokens.json beside it add tokens, but take
none away. Anything else is refused by name rather than tokenized differently. Also renders chat
templates. Needs no torch.
"""

import base64
import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import regex
import sentencepiece
import tiktoken

# One step of reading text: finds ids in a stretch and returns them with the text left between.
# The flag says whether the stretch is where the whole text starts.
Stage = Callable[[str, bool], Iterable[str | int]]

# ---- reading fields: every complaint names the field, naming adds the file ----

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


def _optional(data: dict, name: str, kind: type, where: str = "") -> Any:
    return kind() if data.get(name) is None else _field(data, name, kind, where)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def _read_json(path: Path) -> dict:
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}; expected an object")
    return data


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file, or its directory, before what is said about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


# ---- how vocabularies write bytes ----


def _alphabet() -> list[str]:
    """Byte-level vocabularies write each byte as one printable character, as GPT-2's does:
    printable Latin-1 as itself, the other bytes as U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 0x100 + others.index(b)) for b in range(256)]


_ALPHABET = _alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(_ALPHABET)}


def _to_alphabet(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return data.decode("latin-1").translate(_ALPHABET)


def _from_alphabet(token: str) -> bytes:
    """As in `tokenizers`, an added token too is read in the alphabet if all of it is in there."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


# sentencepiece's vocabularies write characters as they are, a space as U+2581, and have a token
# for each byte of the characters they lack.
_SPACE = "\u2581"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_TOKEN = regex.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_tokens(character: str) -> list[str]:
    return [_BYTE_TOKENS[byte] for byte in character.encode()]


def _from_piece(token: str) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


# ---- byte-pair encoding ----

Pair = tuple[str, str]
_MOST_SECONDS = 60  # to cut up a text: a hostile pattern takes exponential time


def _merge(parts: list[str], priority: Callable[[Pair], int | None]) -> list[str]:
    """Byte-pair encoding as `tokenizers` defines it: lowest priority first, leftmost on a tie.

    Works in `parts`, where a part that the one before has absorbed is empty.
    """
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    heap = [
        (rank, i, pair)
        for i, pair in enumerate(pairwise(parts))
        if (rank := priority(pair)) is not None
    ]
    heapify(heap)
    while heap:
        _, i, pair = heappop(heap)
        j = after[i]
        if j == len(parts) or (parts[i], parts[j]) != pair:
            continue  # an entry made stale by an earlier merge
        parts[i], parts[j], after[i] = pair[0] + pair[1], "", after[j]
        if after[i] < len(parts):
            before[after[i]] = i
        for k in (before[i], i):
            if k >= 0 and after[k] < len(parts):
                new = (parts[k], parts[after[k]])
                if (rank := priority(new)) is not None:
                    heappush(heap, (rank, k, new))
    return [part for part in parts if part]


def _merger(
    pieces: str,
    vocab: dict[str, int],
    priority: Callable[[Pair], int | None],
    spell: Callable[[str], str] = str,
    unknown: Callable[[str], Iterable[str]] = lambda character: (),
    whole_first: bool = False,
) -> Stage:
    """Cuts text into pieces, spells each in the vocabulary's characters and merges these.

    `unknown`: the tokens for a character that is none itself; without any it is dropped, and its
    neighbours can still merge. `whole_first`: a piece that is itself a token is not merged.
    """
    finder = regex.compile(pieces)

    @lru_cache(maxsize=1 << 14)  # most words of a text have been seen before
    def encode_piece(piece: str) -> list[int]:
        spelled = spell(piece)
        if whole_first and spelled in vocab:
            return [vocab[spelled]]
        parts = [part for c in spelled for part in ([c] if c in vocab else unknown(c))]
        return [vocab[part] for part in _merge(parts, priority)]

    def encode(text: str, _: bool) -> Iterator[int]:
        try:
            found = [match.group() for match in finder.finditer(text, timeout=_MOST_SECONDS)]
        except TimeoutError:
            what = f"the tokenizer's pattern {pieces[:60]!r} takes over {_MOST_SECONDS} s"
            raise ValueError(f"{what} on a text of {len(text)} characters") from None
        for piece in found:
            yield from encode_piece(piece)

    return encode


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


def _read_merges(model: dict, vocab: dict[str, int]) -> dict[Pair, int]:
    merges = {}
    for i, merge in enumerate(_field(model, "merges", list, "model.")):
        if isinstance(merge, str) and merge.startswith("#version"):
            continue  # the heading of an old merges.txt
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) and part for part in pair):
            _unsupported(f"model.merges[{i}]", merge, '"left right" or ["left", "right"]')
        if not vocab.keys() >= {*pair, pair[0] + pair[1]}:
            merge = json.dumps(merge)
            raise ValueError(f"model.merges[{i}] {merge} has a part or a result not in model.vocab")
        merges[tuple(pair)] = i  # of two equal pairs the later one counts, as in `tokenizers`
    return merges


# ---- pre-tokenizers: how text is cut into pieces before merging, as one regular expression ----

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+"
_GPT2 = rf"{_WORDS}| ?\p{{N}}+|{_REST}|\s+(?!\S)|\s+"
# Syntax that means the same to this engine and that of `tokenizers` (^ $ . and {2}+ do not).
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
    except (regex.error, RecursionError):
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
    # Text between two matches is a piece of its own.
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


# ---- sentencepiece's pieces and the spaces before them ----


def _spaced_pieces(merges: Iterable[Pair], split: bool) -> str:
    """Pieces that are merged each by itself: words, if the file says so or it changes nothing.

    Where no merge gives a token that goes on with a space after something else, none can cross
    such a place, so the text may be cut there.
    """
    if split:
        return f"{_SPACE}[^{_SPACE}]*|[^{_SPACE}]+"
    crossing = regex.compile(f"[^{_SPACE}]{_SPACE}")
    if any(crossing.search(left + right) for left, right in merges):
        return r"[\s\S]+"
    return f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+"


def _prepend_space(text: str, _: bool) -> list[str]:
    """As in sentencepiece, also before text that has one already."""
    return [_SPACE + text.replace(" ", _SPACE)]


def _add_space(text: str, _: bool) -> list[str]:
    """As in ByteLevel, only before text that has none."""
    return [text if text.startswith(" ") else " " + text]


def _metaspace(step: dict) -> Stage:
    """A space before text that has none: always, only where the whole text starts, or never."""
    scheme = step.get("prepend_scheme", "always")
    if step.get("replacement") != _SPACE or scheme not in ("always", "first", "never"):
        _unsupported("pre_tokenizer", step, 'U+2581 before "always", "first" or "never"')

    def prepend(text: str, at_start: bool) -> list[str]:
        text = text.replace(" ", _SPACE)
        wanted = scheme == "always" or (scheme == "first" and at_start)
        return [_SPACE + text if wanted and not text.startswith(_SPACE) else text]

    return prepend


# ---- added tokens: found in the text before anything else ----

_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
_SPACES = regex.compile(f"[{_WHITE}]*")


def _touches_word(text: str, start: int, stop: int) -> bool:
    return bool((start > 0 and _WORD.match(text, start - 1)) or _WORD.match(text, stop))


def _finder(tokens: dict[str, dict]) -> Stage:
    """Finds tokens, given by content: leftmost first, then longest."""
    longest_first = sorted(tokens, key=len, reverse=True)
    finder = regex.compile("|".join(map(regex.escape, longest_first)))

    def split(text: str, _: bool) -> Iterator[str | int]:
        done = 0
        for match in finder.finditer(text):
            token, (start, stop) = tokens[match.group()], match.span()
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

    return split


def _read_added(entries: Iterable[tuple[str, Any]], vocab: dict[str, int]) -> list[dict]:
    """Added tokens out of (where it is written, token) pairs; of equal ones the last counts."""
    id_of, token_of, tokens = dict(vocab), {id: token for token, id in vocab.items()}, {}
    for where, token in entries:
        content = _field(token if isinstance(token, dict) else {}, "content", str, where)
        id = _field(token, "id", int, where)
        known = (id_of.setdefault(content, id), token_of.setdefault(id, content))
        if known != (id, content) or id < 0:
            raise ValueError(f"{where}id {id} of {json.dumps(content)} contradicts another token")
        tokens[content] = token
    return [token for content, token in tokens.items() if content]


def _added_stages(tokens: list[dict], normalize: Stage | None) -> list[Stage]:
    """Tokens marked `normalized` are looked for only in what the others leave, and there both it
    and they are normalized."""
    raw = {token["content"]: token for token in tokens if not token.get("normalized")}
    rest = {token["content"]: token for token in tokens if token.get("normalized")}
    if normalize:
        rest = {"".join(normalize(content, True)): token for content, token in rest.items()}
    return [
        *([_finder(raw)] if raw else []),
        *([normalize] if normalize else []),
        *([_finder(rest)] if rest else []),
    ]


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


def _render(
    template: str | None, tokens: dict[str, str], messages: list[dict], add_generation_prompt: bool
) -> str:
    if template is None:
        raise ValueError(
            "this checkpoint has no default chat template: give plain prompts instead of"
            " messages, or put a chat_template.jinja beside its tokenizer files"
        )
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        return _compile_template(template).render(**tokens, **given, tools=None, documents=None)
    except Exception as error:  # a template is a program, so it can raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"chat template: {type(error).__name__}: {reason}") from None


def _turn_end(template: str | None, tokens: dict[str, str], added: Iterable[str]) -> str | None:
    """The added token that the template writes after an answer, which is often not eos_token."""
    answer = "a b c"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    try:
        _, found, rest = _render(template, tokens, chat, False).rpartition(answer)
    except ValueError:
        return None
    ends = [token for token in added if found and rest.lstrip().startswith(token)]
    return max(ends, key=len, default=None)


# ---- the tokenizer ----


_ONE_PER_BYTE = "one U+FFFD per byte"  # a name that codecs resolves
codecs.register_error(_ONE_PER_BYTE, lambda e: ("\ufffd" * (e.end - e.start), e.end))


class TextStream:
    """Text of ids that arrive in batches: what push and finish return, joined, is the decode of
    all of them. A character whose bytes are still incomplete is held back until they are."""

    def __init__(self, token_bytes: dict[int, bytes], errors: str, drop_space: bool):
        self.token_bytes = token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
        self.drop_space = self.at_space = drop_space

    def push(self, ids: Iterable[int]) -> str:
        return self.decode(b"".join(self.token_bytes.get(id, b"") for id in ids))

    def finish(self) -> str:
        """What was held back, as U+FFFD; the stream is empty again afterwards."""
        text = self.decode(b"", final=True)
        self.at_space = self.drop_space
        return text

    def decode(self, data: bytes, final: bool = False) -> str:
        text = self.decoder.decode(data, final)
        if text and self.at_space:
            self.at_space = False
            return text.removeprefix(" ")
        return text


@dataclass(frozen=True)
class Tokenizer:
    """Made by load_tokenizer. `eos_ids` and `chat_template` are those of the tokenizer's files."""

    source: str  # the file it was read from and its kind: "tokenizer.model (sentencepiece)"
    stages: list[Stage]  # text becomes ids; what the last one leaves are ids alone
    around: tuple[list[int], list[int]]  # ids before and after the text
    token_bytes: dict[int, bytes]
    text_bytes: dict[int, bytes]  # the same without special tokens
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]  # each ends an answer
    chat_template: str | None
    byte_errors: str  # codecs' name of what to do with invalid UTF-8
    drop_space: bool  # a space was put before the text, so one is taken off

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return max(self.token_bytes) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of the text; added tokens written out in it become their ids.

        Half of a surrogate pair, which no UTF-8 can hold, is read as U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts: list[str | int] = [text] if text else []
        for stage in self.stages:
            parts = [
                x
                for i, part in enumerate(parts)
                for x in (stage(part, i == 0) if type(part) is str else [part])
            ]
        return [*self.around[0], *parts, *self.around[1]] if add_special_tokens else parts

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids. An id that names no token gives nothing, invalid UTF-8 gives U+FFFD.

        From sentencepiece's byte tokens it gives one for each byte, as that library does, so that
        a stream need not wait for the last of them (`tokenizers` replaces the whole run of bytes).
        """
        stream = self.stream(skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special_tokens: bool = True, continues: bool = False) -> TextStream:
        """`continues`: the ids go on after others, so a space at their start is text."""
        token_bytes = self.text_bytes if skip_special_tokens else self.token_bytes
        return TextStream(token_bytes, self.byte_errors, self.drop_space and not continues)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The prompt for these {"role": ..., "content": ...} messages.

        The template writes bos itself, so encode the result with add_special_tokens=False.
        ValueError: there is no template, or it failed, or it refused the messages.
        """
        return _render(self.chat_template, self.special_tokens, messages, add_generation_prompt)


# ---- the files beside: they name special tokens and add tokens ----


@dataclass(frozen=True)
class _Beside:
    config: dict  # tokenizer_config.json
    token_map: dict  # special_tokens_map.json
    added: dict  # added_tokens.json: ids by content
    chat_template: str | None

    def roles(self) -> list[tuple[str, str]]:
        """("eos_token", "</s>") and the like; of two for one role the later counts."""
        named = [*self.token_map.items(), *self.config.items()]
        return [(k, _content(v)) for k, v in named if k.endswith("_token") and _content(v)]

    def tokens(self, vocab: dict[str, int]) -> Iterator[tuple[str, Any]]:
        """(where it is written, added token) pairs."""
        special = {token for _, token in self.roles()}
        file = "tokenizer_config.json: "
        for where, source in (("special_tokens_map.json: ", self.token_map), (file, self.config)):
            for name in ("additional_special_tokens", "extra_special_tokens"):
                listed = source.get(name) or []
                if not isinstance(listed, list | dict):
                    _unsupported(where + name, listed, "a list or an object")
                special.update(map(_content, listed.values() if type(listed) is dict else listed))
        for content in special & vocab.keys():
            yield "", {"content": content, "id": vocab[content], "special": True}
        for content, id in self.added.items():
            token = {"content": content, "id": id, "special": content in special}
            yield f"added_tokens.json[{json.dumps(content)}].", token
        for id, token in _optional(self.config, "added_tokens_decoder", dict, file).items():
            where = f"{file}added_tokens_decoder[{json.dumps(id)}]."
            number = int(id) if id.isdecimal() else id
            yield where, token | {"id": number} if isinstance(token, dict) else token


def _content(token: Any) -> str | None:
    """A special token may be given as a string or as an AddedToken object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_chat_template(directory: Path, config: dict) -> str | None:
    """chat_template.jinja if there, else tokenizer_config.json's own or the one named default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = next((x.get("template") for x in named if x.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        with naming(directory / "tokenizer_config.json"):
            _unsupported("chat_template", template, "a string, or named ones")
    return template


def _read_beside(directory: Path) -> _Beside:
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    files = [_read_json(file) if (file := directory / name).is_file() else {} for name in names]
    return _Beside(*files, _read_chat_template(directory, files[0]))


# ---- the tokenizer files ----


@dataclass(frozen=True)
class _Model:
    """What a tokenizer file says by itself; the files beside it add to that."""

    kind: str
    vocab: dict[str, int]
    spell: Callable[[str], bytes]  # of a token
    stages: list[Stage]  # for text in which no added token is left
    added: Iterable[tuple[str, Any]] = ()  # (where it is written, token) pairs
    normalize: Stage | None = None  # before added tokens marked `normalized` are looked for
    around: tuple[list[int], list[int]] | None = None  # None: decided by add_bos_token and the like
    add_bos: bool = False  # where add_bos_token is not given
    special_tokens: dict[str, str] = field(default_factory=dict)  # where none are named beside
    byte_errors: str = "replace"
    drop_space: bool = False


def _special(ids: dict[str, int]) -> list[tuple[str, dict]]:
    return [("", {"content": token, "id": id, "special": True}) for token, id in ids.items()]


_MODEL_DEFAULTS = {
    "type": (None, "BPE"),  # older files name no type
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "dropout": (None, 0),
}
_NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_FROM_SPACE = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_DECODERS = [_FROM_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
_DROP_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _byte_level_json(data: dict) -> _Model:
    if data.get("normalizer") not in _NO_NORMALIZER:
        _unsupported("normalizer", data["normalizer"], "null")
    decoder = data.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        _unsupported("decoder", decoder, "ByteLevel")
    model, (pieces, prefix_space) = data["model"], _pre_tokenizer(data)
    vocab = _read_vocab(model)
    merges = _read_merges(model, vocab)
    if model.get("unk_token") and not vocab.keys() >= set(_ALPHABET):
        _unsupported("model.unk_token", model["unk_token"], "null where bytes have no token")
    whole_first = bool(model.get("ignore_merges"))
    merge = _merger(pieces, vocab, merges.get, _to_alphabet, whole_first=whole_first)
    stages = [_add_space, merge] if prefix_space else [merge]
    return _Model("byte-level BPE", vocab, _from_alphabet, stages)


def _sentencepiece_json(data: dict) -> _Model:
    """Either Llama 2's normalizer puts a space before each stretch of text between tokens found
    in it, or a Metaspace pre-tokenizer says before which."""
    model, normalizer, step = data["model"], data.get("normalizer"), data.get("pre_tokenizer")
    llama2 = normalizer == {"type": "Sequence", "normalizers": [_PREPEND, _TO_SPACE]} and not step
    metaspace = isinstance(step, dict) and step.get("type") == "Metaspace"
    if not llama2 and (normalizer not in _NO_NORMALIZER or not metaspace):
        supported = "[Prepend U+2581 + Replace, null] or [null, Metaspace] (byte_fallback)"
        _unsupported("[normalizer, pre_tokenizer]", [normalizer, step], supported)
    decoder = data.get("decoder")
    decoders = decoder.get("decoders") if isinstance(decoder, dict) else None
    if decoders not in (_DECODERS, [*_DECODERS, _DROP_SPACE]):
        supported = "Replace U+2581, ByteFallback, Fuse and at most one Strip (byte_fallback)"
        _unsupported("decoder", decoder, supported)
    if model.get("ignore_merges"):
        _unsupported("model.ignore_merges", True, "false with byte_fallback")
    vocab = _read_vocab(model)
    merges = _read_merges(model, vocab)
    if missing := [token for token in _BYTE_TOKENS if token not in vocab]:
        raise ValueError(f"model.vocab has no {missing[0]}; byte_fallback needs a token per byte")
    pieces = _spaced_pieces(merges, metaspace and step.get("split", True))
    merge = _merger(pieces, vocab, merges.get, unknown=_byte_tokens)
    return _Model(
        "sentencepiece BPE",
        vocab,
        _from_piece,
        [merge] if llama2 else [_metaspace(step), merge],
        normalize=_prepend_space if llama2 else None,
        byte_errors=_ONE_PER_BYTE,
        drop_space=_DROP_SPACE in decoders,
    )


def _read_tokenizer_json(path: Path, _: _Beside) -> _Model:
    data = _read_json(path)
    with naming(path):
        model = _field(data, "model", dict)
        for name, supported in _MODEL_DEFAULTS.items():
            if model.get(name) not in supported:
                _unsupported(f"model.{name}", model[name], json.dumps(supported[1]))
        read = _sentencepiece_json if model.get("byte_fallback") else _byte_level_json
        added = enumerate(_optional(data, "added_tokens", list))
        return replace(
            read(data),
            added=[(f"added_tokens[{i}].", token) for i, token in added],
            around=_post_processor(data.get("post_processor")),
        )


def _read_vocab_and_merges(path: Path, beside: _Beside) -> _Model:
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise ValueError(f"{path}: {merges.name} is missing beside it")
    lines = _read_text(merges).replace("\r\n", "\n").removesuffix("\n").split("\n")
    model = {"vocab": _read_json(path), "merges": lines}
    with naming(path.with_name("vocab.json + merges.txt")):
        space = bool(beside.config.get("add_prefix_space"))
        step = {"type": "ByteLevel", "add_prefix_space": space}
        data = {"model": model, "pre_tokenizer": step, "decoder": {"type": "ByteLevel"}}
        model = replace(_byte_level_json(data), kind="byte-level BPE with merges.txt")
    end = "<|endoftext|>"  # GPT-2's only special token, which these two files do not mark
    if end not in model.vocab:
        return model
    roles = {"bos_token": end, "eos_token": end}
    return replace(model, added=_special({end: model.vocab[end]}), special_tokens=roles)


_RANK = regex.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama3_special_tokens(first_id: int) -> dict[str, int]:
    """Llama 3's 256."""
    reserved = [f"reserved_special_token_{i}" for i in range(251)]
    names = ["begin_of_text", "end_of_text", *reserved[:4], "start_header_id", "end_header_id"]
    names += [reserved[4], "eot_id", *reserved[5:]]
    return {f"<|{name}|>": id for id, name in enumerate(names, first_id)}


def _read_ranks(data: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(data.rstrip(b"\n").split(b"\n"), 1):
        match = _RANK.fullmatch(line)
        try:
            ranks[base64.b64decode(match[1], validate=True)] = int(match[2])
        except (TypeError, ValueError):  # no match, or not base64
            shown = repr(line[:40])[1:]
            raise ValueError(f"line {number} is {shown}; expected base64 and a rank") from None
    if sorted(ranks.values()) != list(range(number)):
        raise ValueError(f"the ranks of its {number} lines are not 0 to {number - 1}, once each")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"byte {missing[0]} has no rank; expected one for each byte")
    return ranks


def _ranks_encoder(ranks: dict[bytes, int]) -> Stage:
    encoding = tiktoken.Encoding(
        "llama3", pat_str=_LLAMA3, mergeable_ranks=ranks, special_tokens={}
    )

    def encode(text: str, _: bool) -> list[int]:
        try:
            return encoding.encode_ordinary(text)
        except BaseException as error:
            # A Rust panic, as at the limit of its regular expressions, is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"tiktoken cannot split this text of {len(text)} characters ({reason}); "
                "shorten its longest run of white space"
            ) from None

    return encode


def _tiktoken(data: bytes, beside: _Beside) -> _Model:
    """Meta's file has the ranks alone; pattern and special tokens are in Llama 3's program."""
    ranks = _read_ranks(data)
    vocab = {_to_alphabet(token): rank for token, rank in ranks.items()}
    model = _Model("tiktoken ranks", vocab, _from_alphabet, [_ranks_encoder(ranks)], add_bos=True)
    if "added_tokens_decoder" in beside.config:  # Llama 3.1 has other names for some of the ids
        return model
    roles = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "eot": "<|eot_id|>"}
    return replace(
        model,
        added=_special(_llama3_special_tokens(len(ranks))),
        special_tokens={f"{role}_token": token for role, token in roles.items()},
    )


# Appended to a model it sets normalizer_spec.add_dummy_prefix to false: protocol buffers merge.
_NO_PREFIX = b"\x1a\x02\x18\x00"


def _sentencepiece(data: bytes, beside: _Beside) -> _Model:
    """Each stretch of text between tokens found in it gets a space in front, as each text does in
    sentencepiece; with `"legacy": false` only the one where the whole text starts."""
    try:
        prefixed = sentencepiece.SentencePieceProcessor(model_proto=data)
        bare = sentencepiece.SentencePieceProcessor(model_proto=data + _NO_PREFIX)
        pieces = prefixed.id_to_piece(list(range(prefixed.vocab_size())))
    except (RuntimeError, UnicodeDecodeError):
        raise ValueError(
            "neither a sentencepiece model nor tiktoken ranks; the file is damaged: fetch it again"
        ) from None
    legacy = beside.config.get("legacy") is not False
    found = {p: i for i, p in enumerate(pieces) if prefixed.is_control(i) or prefixed.is_unknown(i)}
    roles = {"bos_token": prefixed.bos_id(), "eos_token": prefixed.eos_id()}
    return _Model(
        "sentencepiece",
        {piece: id for id, piece in enumerate(pieces)},
        _from_piece,
        [lambda text, at_start: (prefixed if legacy or at_start else bare).encode(text)],
        added=_special(found),
        add_bos=True,
        special_tokens={role: pieces[id] for role, id in roles.items() if id >= 0},
        byte_errors=_ONE_PER_BYTE,
        drop_space=prefixed.normalize("a").startswith(_SPACE),
    )


def _read_tokenizer_model(path: Path, beside: _Beside) -> _Model:
    data = path.read_bytes()
    is_ranks = _RANK.fullmatch(data.partition(b"\n")[0])
    with naming(path):
        return (_tiktoken if is_ranks else _sentencepiece)(data, beside)


# ---- loading ----

_READERS = {
    "tokenizer.json": _read_tokenizer_json,
    "tokenizer.model": _read_tokenizer_model,
    "vocab.json": _read_vocab_and_merges,
    "original/tokenizer.model": _read_tokenizer_model,
}
_OTHER_FILES = ("merges.txt", "spiece.model", "vocab.txt", "tokenizer.tiktoken")


def _around(model: _Model, config: dict, ids: dict[str, int], tokens: dict[str, str]) -> tuple:
    """tokenizer.json's post_processor decides; only where it is silent do add_bos_token and
    add_eos_token."""
    if model.around is not None:
        return model.around

    def ids_of(role: str, default: bool) -> list[int]:
        wanted, id = config.get(f"add_{role}_token"), ids.get(tokens.get(f"{role}_token"))
        return [id] if id is not None and (default if wanted is None else wanted) else []

    return ids_of("bos", model.add_bos), ids_of("eos", False)


def _eos_ids(beside: _Beside, ids: dict[str, int], tokens: dict[str, str], turn_end: str | None):
    """Every token by which the files say that an answer ends. They need not agree: Granite 7B's
    config names </s>, but its turns end with another."""
    ends = [token for role, token in beside.roles() if role == "eos_token"]
    for eos in ends:
        if eos not in ids:
            found = f"{json.dumps(eos)}, the eos_token of tokenizer_config.json"
            raise ValueError(f"has no token {found} or special_tokens_map.json")
    ends = [tokens.get("eos_token"), *ends, tokens.get("eot_token"), turn_end]
    return tuple(dict.fromkeys(ids[end] for end in ends if end in ids))


def _tokenizer(model: _Model, beside: _Beside, source: str) -> Tokenizer:
    added = _read_added([*beside.tokens(model.vocab), *model.added], model.vocab)
    tokens = model.special_tokens | dict(beside.roles())
    ids = model.vocab | {token["content"]: token["id"] for token in added}
    special = {token["id"] for token in added if token.get("special")}
    token_bytes = {id: model.spell(token) for token, id in ids.items()}
    turn_end = _turn_end(beside.chat_template, tokens, (token["content"] for token in added))
    return Tokenizer(
        source=f"{source} ({model.kind})",
        stages=[*_added_stages(added, model.normalize), *model.stages],
        around=_around(model, beside.config, ids, tokens),
        token_bytes=token_bytes,
        text_bytes={id: text for id, text in token_bytes.items() if id not in special},
        special_tokens=tokens,
        eos_ids=_eos_ids(beside, ids, tokens, turn_end),
        chat_template=beside.chat_template,
        byte_errors=model.byte_errors,
        drop_space=model.drop_space,
    )


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None if it has no tokenizer file at all.

    ValueError, in one line naming file and field: the directory is missing, a file is malformed,
    or the tokenizer is of a kind that is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    source = next((name for name in _READERS if (directory / name).is_file()), None)
    if source is None:
        others = [directory / name for name in _OTHER_FILES if (directory / name).is_file()]
        if others:
            raise ValueError(f"{others[0]}: not supported alone; supported: {', '.join(_READERS)}")
        return None
    beside = _read_beside(directory)
    model = _READERS[source](directory / source, beside)
    with naming(directory / source):
        return _tokenizer(model, beside, source)
