"""Noise, filters, acceptance and the distribution of what comes out, in float32 on the CPU.

Every test is seeded: it passes always or never. A stated chance of failure is that of a right
implementation with another hash.
"""

import math
import re

import pytest
import torch
from conftest import tiny_llama, tiny_speculator
from transformers import (
    LlamaForCausalLM,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fastspec
from fastspec import (
    MAX_STOP_IDS,
    Engine,
    Request,
    SamplingParams,
    count_emitted,
    decode_loop,
    gumbel,
    kept_tokens,
    likely_tokens,
    mass,
    mix,
    noise,
    probabilities,
    step_needs,
)
from model import load_model
from speculator import load_speculator

INT32 = {"dtype": torch.int32}
BIG = 128256  # the vocabulary of Llama 3


# ---- noise ----


def words(unsigned: torch.Tensor) -> torch.Tensor:
    """Unsigned 32-bit words, given in int64, as the int32 that holds the same bits."""
    return torch.where(unsigned < 2**31, unsigned, unsigned - 2**32).int()


def test_gumbel_is_finite_at_the_ends():
    """Words 0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000: -log(-log(1 - u)) at u = 2^-33, nearly 1, 1/2.

    The smallest is what the largest float32 below 1 gives: -log(24 log 2) = -2.81.
    """
    g = gumbel(torch.tensor([0, -1, 2**31 - 1, -(2**31)], **INT32))
    expected = [33 * math.log(2), -math.log(24 * math.log(2))] + 2 * [-math.log(math.log(2))]
    assert g.tolist() == pytest.approx(expected, abs=1e-5)


def test_gumbel_falls_with_the_word():
    """Monotone over the unsigned words, ends and the sign change included; no plateau but the
    few hundred words that float32 rounds together at the low end of the noise."""
    near = torch.arange(3000)
    spread = torch.linspace(0, 2**32 - 1, 100_000, dtype=torch.float64).long()
    unsigned = torch.cat((near, spread, 2**31 - 1500 + near, 2**32 - 3000 + near)).unique()
    g = gumbel(words(unsigned))
    assert (g.diff() <= 0).all()
    assert (gumbel(words(near)).diff() < 0).all()
    assert (gumbel(words(spread)).diff() < 0).all()


def test_noise_has_the_mean_and_variance_of_gumbel():
    """Over n = 10^6 draws the mean has standard deviation sigma / 1000, and the sample variance
    sigma^2 sqrt((kurtosis 5.4 - 1) / n); at five of them a right one fails once in 10^6."""
    g = noise(torch.arange(4), torch.arange(25).expand(4, -1), torch.arange(10_000)).double()
    n, variance = g.numel(), math.pi**2 / 6
    assert n == 10**6
    assert abs(g.mean() - 0.5772156649) < 5 * math.sqrt(variance / n)
    assert abs(g.var() - variance) < 5 * variance * math.sqrt(4.4 / n)


@pytest.mark.parametrize("threshold", [2, 8, 14, 17, 20])
def test_as_many_words_as_should_lie_in_the_tail(threshold):
    """Exactly, by bisection over all 2^32 words: the count beyond t is 2^32 (1 - exp(-exp(-t))).

    A 24-bit uniform ends at 16.6 (or, rounded to 1, at infinity), so it fails at 17 and 20. Off
    by at most one word, or by float32's 1e-6 of the noise where the tail is many words.
    """
    low, high = 0, 2**32
    while low < high:
        middle = (low + high) // 2
        above = gumbel(words(torch.tensor([middle]))).item() > threshold
        low, high = (middle + 1, high) if above else (low, middle)
    expected = -(2**32) * math.expm1(-math.exp(-threshold))
    assert low == pytest.approx(expected, abs=1, rel=1e-5)


def test_draws_reach_the_tail():
    """4 x 10^7 draws hold some 1816 values above 10 and 33 above 14: the words are spread evenly
    at the low end too. Five standard deviations of a Poisson count: once in 10^5."""
    counts, n = torch.zeros(2), 0
    for start in range(0, 312, 8):
        g = noise(torch.tensor([77]), start + torch.arange(8)[None], torch.arange(BIG))
        counts += torch.stack([(g > t).sum() for t in (10, 14)])
        n += g.numel()
    for count, t in zip(counts.tolist(), (10, 14), strict=True):
        expected = n * math.exp(-t)
        assert abs(count - expected) < 5 * math.sqrt(expected)


SEEDS = torch.tensor([0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1])


def test_noise_depends_on_seed_position_and_token_alone():
    """Not on the batch, on the number of positions in the call, or on the vocabulary's size."""
    positions = torch.tensor([[0, 5, 6, 7, 131071]]) + torch.arange(len(SEEDS))[:, None]
    together = noise(SEEDS, positions, torch.arange(1000))
    for row, seed in enumerate(SEEDS):
        for column, position in enumerate(positions[row]):
            alone = noise(seed[None], position[None, None], torch.arange(333))[0, 0]
            assert torch.equal(together[row, column, :333], alone)


def test_noise_of_other_seeds_positions_and_tokens_is_unrelated():
    """Correlations over n = 20,000 tokens have standard deviation 1 / sqrt(n). Seeds that differ
    only in their high or their low half, adjacent positions, and shifts by a token or two: six
    deviations, exceeded once in 10^5 by the 10,000 pairs here."""
    n = 20_000
    g = noise(SEEDS, torch.arange(8).expand(len(SEEDS), -1), torch.arange(n + 2)).flatten(0, 1)
    rows = torch.cat((g[:, :n], g[:, 1 : n + 1], g[:, 2:]))
    correlation = torch.corrcoef(rows.double()).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(n)


@pytest.mark.parametrize("high", [1, 2**15, 2**30])
def test_the_high_half_of_a_seed_counts(high):
    """Two words agree by chance once in 2^32, so in 1000 none does."""
    seeds = torch.tensor([5, 5 + high * 2**32])
    first, second = noise(seeds, torch.tensor([[9], [9]]), torch.arange(1000))
    assert not (first == second).any()


def test_no_two_seeds_or_positions_share_shifted_noise():
    """If one word for each (seed, position) were added to the token, some 20 pairs of these 30,000
    would begin less than 100 tokens apart and share all the noise beyond, shifted. No two pieces
    of noise have two successive values in common, but for a chance collision or two."""
    g = noise(torch.arange(3000), torch.arange(10).expand(3000, -1), torch.arange(100))
    bits = g.view(torch.int32).long()
    successive = bits[..., :-1] * 2**32 + (bits[..., 1:] & 0xFFFFFFFF)
    assert successive.numel() - len(successive.unique()) < 5


def test_mix_is_the_finalizer_of_murmurhash3_and_a_bijection():
    """Its published values, and no collision over 10^6 consecutive words around zero."""
    published = {0: 0, 1: 0x514E28B7, 0xFFFFFFFF: 0x81F16F39}
    assert torch.equal(
        mix(words(torch.tensor([*published]))), words(torch.tensor([*published.values()]))
    )
    assert len(mix(torch.arange(-500_000, 500_000, **INT32)).unique()) == 10**6


# ---- filters ----


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """kept_tokens for logits [B, n, V]; a setting is one number or one for each row."""
    settings = (torch.as_tensor(s).expand(len(logits)) for s in (temperature, top_k, top_p, min_p))
    temperature, *filters = settings
    p = probabilities(logits, temperature)
    found = kept_tokens(p, *filters)
    if not filters[0].any():  # no top-k: it can be left out, and unlikely tokens, too
        columns, few = likely_tokens(p, filters[1]), torch.zeros_like(found)
        few[..., columns] = kept_tokens(p[..., columns], None, *filters[1:], mass(p))
        assert torch.equal(found, few)
    return found


def reference_scores(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits [n, V] through transformers' own filters, in float64 and in their order."""
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = logits.double()
    for warper in warpers:
        scores = warper(None, scores)
    return scores


FILTERS = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_k above the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.9},
    "small top_p": {"top_p": 0.3},
    "large top_p": {"top_p": 0.999},
    "top_k then top_p": {"top_k": 8, "top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "top_k and min_p": {"top_k": 12, "min_p": 0.1},
    "all": {"top_k": 20, "top_p": 0.95, "min_p": 0.02},
}


def random_logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_filters_keep_what_transformers_keeps(filters, temperature):
    """100 random rows. They differ where tokens tie (fastspec keeps them together, transformers'
    top-p cuts by sort order) and where a sum is within rounding of top_p: random logits do
    neither, except once in some 10^4 rows."""
    logits = random_logits(20, 5, 60)
    expected = reference_scores(logits.flatten(0, 1), temperature, **filters) > -torch.inf
    assert torch.equal(kept(logits, temperature, **filters).flatten(0, 1), expected)


def test_each_row_has_its_own_settings():
    """A batch with a different filter in every row gives each row what it gives alone."""
    logits = random_logits(len(FILTERS), 3, 60, seed=1)
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = [defaults | {"temperature": 0.5 + 0.1 * i} | f for i, f in enumerate(FILTERS.values())]
    columns = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    together = kept(logits, **columns)
    for row, settings in enumerate(rows):
        assert torch.equal(together[row : row + 1], kept(logits[row : row + 1], **settings))
    assert len(set(together.sum((1, 2)).tolist())) > len(FILTERS) // 2


TIED = [3.0, 2.0, 1.0, 2.0, -1.0]  # probabilities 0.52, 0.19, 0.07, 0.19, 0.01 and 0.02 less


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1, 3]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.7}, [0, 1, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"min_p": 0.3}, [0, 1, 3]),
        ({"min_p": 0.4}, [0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 3]),
    ],
)
def test_tied_tokens_stay_together(filters, expected):
    assert kept(torch.tensor([[TIED]]), **filters)[0, 0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}])
def test_equal_logits_are_all_kept(filters):
    assert kept(torch.zeros(2, 2, 30), **filters).all()


@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 0.0, "top_p": 0.99}]
)
def test_the_argmax_is_kept_and_alone(filters):
    """By top_k 1, by a tiny top_p, by min_p 1, and by any filter at T = 0 (no NaN)."""
    logits = random_logits(4, 6, 1000, seed=2)
    assert torch.equal(kept(logits, **filters), logits == logits.amax(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.5])
def test_one_hot_logits_keep_their_token(temperature):
    """Also with logits far beyond exp's range, where every other probability is exactly 0."""
    for height in (50.0, 1e4, 1e30):
        logits = torch.zeros(1, 1, 40)
        logits[..., 7] = height
        mask = kept(logits, temperature, top_p=0.9)
        assert mask[0, 0].nonzero().tolist() == [[7]]


def test_no_filter_keeps_every_token_that_can_be_drawn():
    assert kept(random_logits(3, 2, 500, seed=3), torch.tensor([0.3, 1.0, 5.0])).all()


@pytest.mark.parametrize("top_k", [0, 50, 5000])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.999])
def test_top_p_keeps_the_smallest_set_at_a_large_vocabulary(top_p, top_k):
    """By its definition, in float64: the kept tokens are the likeliest, reach top_p of what top-k
    left, and without the last of them do not. A float32 sum of 128256 terms is good to 1e-5."""
    logits = random_logits(1, 1, BIG, seed=4, scale=3.0)
    p, order = logits[0, 0].double().softmax(-1).sort(descending=True)
    p = p[:top_k] if top_k else p
    mask = kept(logits, top_k=top_k, top_p=top_p)[0, 0][order]
    size, share = int(mask.sum()), p.cumsum(0) / p.sum()
    assert mask[:size].all()
    assert share[size - 1] > top_p - 1e-5
    assert size == 1 or share[size - 2] < top_p + 1e-5


def test_min_p_and_top_k_at_a_large_vocabulary():
    logits = random_logits(2, 1, BIG, seed=5, scale=3.0)
    p = logits.double().softmax(-1)
    assert torch.equal(kept(logits, min_p=0.02), p >= 0.02 * p.amax(-1, keepdim=True))
    assert kept(logits, top_k=50).sum(-1).tolist() == [[50], [50]]
    assert torch.equal(kept(logits, top_k=50), p >= p.topk(50).values[..., -1:])


# ---- what comes out of the engine ----


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """P-value of counts against exact probabilities. The rarest cells are pooled until the pool
    and every other cell expects at least 5; a count where the probability is 0 gives 0."""
    counts, p = counts.flatten().double(), probabilities.flatten().double()
    if counts[p == 0].any():
        return 0.0
    expected, order = (p * counts.sum()).sort()
    counts = counts[order]
    pool = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)
    expected, counts = (torch.cat((x[:pool].sum()[None], x[pool:])) for x in (expected, counts))
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@pytest.mark.parametrize(("freedom", "critical"), [(1, 10.828), (15, 37.697), (100, 149.449)])
def test_chi_square_has_the_tabulated_critical_values(freedom, critical):
    """Those of p = 0.001, from equal cells of which one has too many and another too few."""
    expected = torch.full((freedom + 1,), 10_000.0, dtype=torch.float64)
    excess = math.sqrt(critical * expected[0] / 2)
    counts = expected.clone()
    counts[:2] += torch.tensor([excess, -excess])
    assert chi_square(counts, expected / expected.sum()) == pytest.approx(1e-3, rel=1e-3)


V, PROMPT, LIMIT = 14, [3, 1, 4], 1e-6
SETTINGS = {
    "T 0.8": {"temperature": 0.8},
    "T 1": {"temperature": 1.0},
    "top_k": {"temperature": 0.8, "top_k": 4},
    "top_p": {"temperature": 0.8, "top_p": 0.7},
    "min_p": {"temperature": 0.8, "min_p": 0.15},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    target, draft = (tmp_path_factory.mktemp(name) for name in ("target", "speculator"))
    tiny_llama(target, vocab_size=V, num_hidden_layers=1)
    tiny_speculator(draft, vocab_size=V)
    return target, draft


@pytest.fixture(scope="module")
def engine(checkpoints):
    target, draft = checkpoints
    options = {"batch_size": 60, "max_seq_len": 16, "num_draft_tokens": 3}
    return Engine(load_model(target), load_speculator(draft), **options)


def draw(engine, settings):
    """The first three tokens [n, 3] of requests with seeds 0, 1, ...; steps and drafts accepted."""
    params = [SamplingParams(**s, max_tokens=3) for s in settings]
    requests = [Request(PROMPT, p, seed, []) for seed, p in enumerate(params)]
    tokens, accepted = [[] for _ in requests], []
    for event in decode_loop(engine, requests):
        tokens[event.request] += event.tokens
        accepted.append(event.accepted)
    return torch.tensor(tokens), accepted


@pytest.fixture(scope="module")
def draws(engine):
    """{setting: tokens [n, 3]}: 2500 at T = 0.8, and 800 of each other, mixed in a batch."""
    plain, *mixed = SETTINGS
    tokens, _ = draw(engine, [SETTINGS[plain]] * 2500)
    others, _ = draw(engine, [SETTINGS[name] for name in mixed] * 800)
    return {plain: tokens} | {name: others[i :: len(mixed)] for i, name in enumerate(mixed)}


@pytest.fixture(scope="module")
def tree_draws(checkpoints):
    """As `draws`, with a tree of 12 candidates per step."""
    target, draft = load_model(checkpoints[0]), load_speculator(checkpoints[1])
    options = {"batch_size": 60, "max_seq_len": 16, "num_draft_tokens": 3}
    tree = {"tree": 12, "top_k_tokens_per_head": (4, 3, 2)}
    tokens, accepted = draw(Engine(target, draft, **options, **tree), [*SETTINGS.values()] * 700)
    assert sum(accepted) > 0
    return {name: tokens[i :: len(SETTINGS)] for i, name in enumerate(SETTINGS)}


@pytest.fixture(scope="module")
def exact(checkpoints):
    """{setting: probability [V, V, V] of the three tokens}, by transformers' model and filters."""
    model = LlamaForCausalLM.from_pretrained(checkpoints[0])
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    texts = torch.cat((torch.tensor(PROMPT).expand(V * V, -1), pairs), dim=1)
    with torch.inference_mode():
        logits = model(texts).logits[:, len(PROMPT) - 1 :].reshape(V, V, 3, V)
    steps = logits[0, 0, 0], logits[:, 0, 1], logits[:, :, 2]

    def joint(settings):
        first, second, third = (
            reference_scores(step.reshape(-1, V), **settings).softmax(-1).view(step.shape)
            for step in steps
        )
        return first[:, None, None] * second[:, :, None] * third

    return {name: joint(settings) for name, settings in SETTINGS.items()}


def test_the_speculator_is_right_and_wrong(engine):
    """So that what follows sees accepted drafts as well as the target's own choices."""
    _, accepted = draw(engine, [SETTINGS["T 0.8"]] * 200)
    assert 0.1 < sum(count > 0 for count in accepted) / len(accepted) < 0.9


WHERE = {"second token": [1], "first and second": [0, 1], "second and third": [1, 2]}


def p_value(tokens, joint, where):
    """Chi-square of the tokens at the output positions `where` against their exact distribution."""
    flat = sum(tokens[:, at] * V**i for i, at in enumerate(reversed(where)))
    counts = torch.bincount(flat, minlength=V ** len(where))
    return chi_square(counts, joint.sum([at for at in range(3) if at not in where]))


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_have_the_exact_distribution(draws, exact, name, where):
    """With a speculator that is often wrong, by output position and jointly over two of them,
    never given which step a token came from. Chance of failure: 10^-6 each, 2 x 10^-5 in all."""
    assert p_value(draws[name], exact[name], where) > LIMIT


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_of_trees_have_the_exact_distribution(tree_draws, exact, name, where):
    """As of chains, and with their chance of failure."""
    assert p_value(tree_draws[name], exact[name], where) > LIMIT


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "T 0.8"])
def test_the_chi_square_sees_a_wrong_temperature_or_filter(draws, exact, name, where):
    """Draws at T = 0.8 are not those of T = 1 or of a filter: the test above has power."""
    assert p_value(draws["T 0.8"], exact[name], where) < LIMIT


def test_the_chi_square_sees_the_speculators_distribution(engine, exact, monkeypatch):
    """The same engine, made to take every draft as if the target had chosen it, fails."""

    def trusting(draft, sampled, stop_ids, room):
        sampled[:, :-1] = draft
        return count_emitted(draft, sampled, stop_ids, room)

    monkeypatch.setattr(fastspec, "count_emitted", trusting)
    tokens, _ = draw(engine, [SETTINGS["T 0.8"]] * 1000)
    for where in WHERE.values():
        assert p_value(tokens, exact["T 0.8"], where) < LIMIT


@pytest.fixture(scope="module")
def peaked_draws():
    """{share of token 777: tokens drawn} over a flat tail of 128255 others, 3400 draws each."""
    logits = {}
    for share in (0.5, 0.9, 0.999):
        logits[share] = torch.zeros(BIG)
        logits[share][777] = math.log(share / (1 - share) * (BIG - 1))
    chosen = {share: [] for share in logits}
    for start in range(0, 3400, 4):
        g = noise(torch.tensor([2024]), start + torch.arange(4)[None], torch.arange(BIG))[0]
        for share, row in logits.items():
            chosen[share].append((row + g).argmax(-1))
    return {share: torch.cat(parts) for share, parts in chosen.items()}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_the_tail_of_a_large_vocabulary_has_its_mass(peaked_draws, share):
    """The number of draws beside the peak, within five standard deviations (10^-6; for the
    Poisson count 3 of the last case 10^-4). With 24-bit uniforms some 0.75 % of all draws would be
    an infinite, uniformly random token: 25 more, where the last case allows 9."""
    tail, n = (peaked_draws[share] != 777).sum(), len(peaked_draws[share])
    assert abs(tail - n * (1 - share)) < 5 * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_tail_of_a_large_vocabulary_is_uniform(peaked_draws, share):
    """Chi-square over 64 buckets of token ids (27 and 5 draws in each): 10^-6."""
    tail = peaked_draws[share][peaked_draws[share] != 777]
    counts = torch.bincount(tail * 64 // BIG, minlength=64)
    assert chi_square(counts, torch.full((64,), 1 / 64)) > LIMIT


# ---- how many tokens a step emits ----

STOP = [50, 60]


@pytest.mark.parametrize(
    ("draft", "sampled", "room", "expected"),
    [
        pytest.param([7, 8, 9], [7, 8, 5, 4], 99, (3, 2, False), id="example of the docstring"),
        pytest.param([7, 8, 9], [1, 8, 9, 4], 99, (1, 0, False), id="none accepted"),
        pytest.param([7, 8, 9], [7, 8, 9, 4], 99, (4, 3, False), id="all accepted"),
        pytest.param(
            [7, 8, 9], [7, 1, 9, 4], 99, (2, 1, False), id="right again after a wrong one"
        ),
        pytest.param([], [4], 99, (1, 0, False), id="nothing drafted"),
        pytest.param([], [60], 99, (1, 0, True), id="nothing drafted, stop"),
        pytest.param([50, 8, 9], [50, 8, 9, 4], 99, (1, 1, True), id="stop first"),
        pytest.param([7, 60, 9], [7, 60, 9, 4], 99, (2, 2, True), id="stop in the middle"),
        pytest.param([7, 8, 9], [7, 8, 9, 50], 99, (4, 3, True), id="stop last"),
        pytest.param([7, 8, 9], [7, 50, 9, 4], 99, (2, 1, True), id="stop instead of a draft"),
        pytest.param([7, 8, 9], [7, 1, 60, 4], 99, (2, 1, False), id="stop beyond the accepted"),
        pytest.param([7, 50, 9], [7, 1, 9, 4], 99, (2, 1, False), id="stop drafted, not chosen"),
        pytest.param([7, 60, 50], [7, 60, 50, 4], 99, (2, 2, True), id="the first of two stops"),
        pytest.param([7, 8, 9], [7, 8, 9, 4], 0, (0, 0, False), id="no room"),
        pytest.param([50, 8, 9], [50, 8, 9, 4], 0, (0, 0, False), id="no room for a stop"),
        pytest.param([7, 8, 9], [7, 8, 9, 4], 1, (1, 1, False), id="room for one"),
        pytest.param([7, 8, 9], [7, 8, 9, 4], 3, (3, 3, False), id="less room than accepted"),
        pytest.param([7, 8, 9], [7, 8, 9, 4], 4, (4, 3, False), id="just enough room"),
        pytest.param([7, 8, 50], [7, 8, 50, 4], 2, (2, 2, False), id="stop beyond the room"),
        pytest.param([7, 50, 9], [7, 50, 9, 4], 2, (2, 2, True), id="stop in the last room"),
    ],
)
def test_count_emitted(draft, sampled, room, expected):
    """(emitted, accepted, stopped), worked out by hand; accepted drafts are counted if emitted."""
    stop_ids = torch.tensor([STOP + [-1] * (MAX_STOP_IDS - len(STOP))])
    drafts = torch.tensor([draft], dtype=torch.int64).view(1, -1)
    out = count_emitted(drafts, torch.tensor([sampled]), stop_ids, torch.tensor([room]))
    assert tuple(x.item() for x in out) == expected


def test_count_emitted_treats_rows_apart():
    """Each row with its own stop ids and room."""
    row = [7, 8, 9, 4]
    stop_ids = torch.tensor([[8, -1], [-1, -1], [9, 7]])
    room = torch.tensor([9, 2, 9])
    out = count_emitted(torch.tensor([row[:3]] * 3), torch.tensor([row] * 3), stop_ids, room)
    assert [x.tolist() for x in out] == [[2, 2, 1], [2, 2, 1], [True, False, True]]


# ---- SamplingParams ----


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.seed, params.ignore_eos) == (16, None, False)
    assert (params.stop, params.stop_token_ids) == ((), ())


@pytest.mark.parametrize(
    "name",
    ["n", "best_of", "logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty"],
)
def test_what_is_not_supported_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^SamplingParams: {name} is not supported; supported: "):
        SamplingParams(temperature=0.5, **{name: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 3.0),
        ("temperature", "1"),
        ("top_k", True),
        ("max_tokens", "9"),
        ("seed", 1.5),
        ("seed", "x"),
        ("stop", ("a", "")),
        ("stop", (3,)),
        ("stop_token_ids", ("x",)),
        ("stop_token_ids", (2**70,)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    message = re.escape(f"SamplingParams: {name} {value!r} is out of range")
    with pytest.raises(ValueError, match=f"^{message}: an? |^{message}: above 0|^{message}: True"):
        SamplingParams(**{name: value})


def test_a_step_does_only_what_a_request_needs():
    greedy, warm = {"temperature": 0.0}, {"temperature": 0.8}
    for expected, *rows in (
        ((False, 0), greedy, greedy | {"top_p": 0.9, "top_k": 5}),
        ((True, 0), greedy, warm),
        ((True, 1), warm, warm | {"top_p": 0.9}, greedy | {"top_k": 5}),
        ((True, 1), warm | {"min_p": 0.1}),
        ((True, 2), warm | {"top_k": 5}, warm | {"top_p": 0.9}),
    ):
        assert step_needs(SamplingParams(**row) for row in rows) == expected


def test_values_are_brought_into_one_form():
    """top_k -1 is 0 (keep all), as in vLLM; one stop string is a tuple of one."""
    params = SamplingParams(top_k=-1, stop="end", stop_token_ids=(3, 4))
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ("end",), (3, 4))
    assert SamplingParams(top_k=7, stop=("a", "b")).stop == ("a", "b")
