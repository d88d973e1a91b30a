"""Data: items, interactions, splits, candidate lists, and where they come from.

A data set is a catalogue of `Item`s and, for each user, a time-ordered sequence of interactions. A list to be ranked
(`Example`) is one interaction to predict (the *target*), the interactions just before it (the *history*) and
K candidates: the target and K - 1 negatives that the user never touched.

    load("toy")                      a seeded synthetic beauty shop; nothing to download                  users apart
    load("beauty")                   Amazon 2014, 5-core; also toys, sports, games, instruments           leave-one-out
    load("amazon2023:Video_Games")   Amazon Reviews 2023, 5-core, any category of its benchmark           temporal
    load("ml-100k"), load("ml-1m")   MovieLens                                                            temporal
    load("recbench:movie")           RecBench+ (ReRec's benchmark), or recbench:book, from --data-dir     users apart
    load("path/to/NAME")             a folder with RecBole atomic files: NAME.inter, NAME.item
                                     [, NAME.user, NAME.kg, NAME.link]                                    leave-one-out

Splits (METHODS "Protocol"); the default of each source is on the right:
  temporal       global, 80/10/10 of the (history, target) examples; the borders are points in time, so that no training
                 example is as late as a validation example (examples that tie with a border all fall after it)
  leave-one-out  last interaction of a user = test, last but one = validation; for sets without usable timestamps, and what
                 the literature uses on Amazon 2014
  users apart    the toy: training, validation and test users are different people

Choices of ours:
  1. Negatives exclude everything the user *ever* touched, also after the target. So no negative is a hidden positive, and no
     validation or test interaction can stand in a training prompt, not even as a negative.
  2. Everything random follows from (seed, user, position): a list is the same whichever other lists are drawn, and when.
  3. Amazon's price, sales rank, mean rating and number of ratings are not shown to the model: they were collected after the
     last interaction, so they know the future.
  4. Of Amazon's category paths the first is kept, without its root, which all items of a set share.
"""

import ast
import bisect
import contextlib
import gc
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import ssl
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

MAX_TEXT = 300  # characters kept of a title or of one attribute value
MAX_LINE = 1 << 22  # bytes of one line of a file; a longer one is broken


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""


@dataclass(frozen=True)
class Item:
    """One catalogue entry. Two items are equal when their ids are.

    attributes: name -> values, the most general first (a category path, for instance). `ago` and `rating` are only set on
    the items of a history: how long before the target ("3 days ago"), and what the user gave; `facts` on candidates: see
    Facts; with `only_facts` a prompt shows these alone.
    """

    id: str
    title: str = field(compare=False)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    ago: str = field(default="", compare=False)
    rating: float | None = field(default=None, compare=False)
    facts: dict[str, int] = field(default_factory=dict, compare=False)
    only_facts: bool = field(default=False, compare=False)


class Interaction(NamedTuple):  # a tuple, because there are millions
    item_id: str
    timestamp: float = 0.0  # seconds; only the order matters where the data has no clock
    rating: float | None = None


@dataclass(frozen=True)
class Example:
    """One list to rank: `history` oldest first, K `candidates`, and their `relevance` (K,) >= 0, in the same order."""

    user: str
    history: list[Item]
    candidates: list[Item]
    relevance: list[float]


NEGATIVES = ("uniform", "popularity", "category")
CATEGORY_FIELDS = ("categories", "category", "genre", "genres", "class", "kind")


@dataclass
class Dataset:
    """A catalogue, the users' sequences, and which position of which user belongs to which split.

    splits: "train", "validation", "test" -> [(user, position of the target in the user's sequence)].
    train_length: user -> how many of the user's first interactions lie in the training period; nothing beyond them may be
    counted, shown or learnt from in training.
    users: user -> {field: value}, where the source tells something about its users.
    negatives: "uniform" over the catalogue; "popularity", in proportion to training counts; "category", from the positive's
    own category, the most special level that has enough items first, then from the levels above it.
    facts: where set, every candidate comes with its own.
    """

    name: str
    items: dict[str, Item]
    sequences: dict[str, list[Interaction]]
    splits: dict[str, list[tuple[str, int]]]
    train_length: dict[str, int]
    has_clock: bool = False
    users: dict[str, dict[str, str]] = field(default_factory=dict)
    negatives: str = "uniform"
    bench: "RecBench | None" = None
    facts: "Facts | None" = None
    item_ids: list[str] = field(init=False)

    def __post_init__(self):
        self.item_ids = list(self.items)
        if self.negatives == "popularity":
            counts = self.popularity()
            self._drawn_from = list(counts)
            self._cumulative = list(itertools.accumulate(counts.values()))
        elif self.negatives == "category":
            self._by_category = {}
            for item in self.items.values():
                for value in _categories(item):
                    self._by_category.setdefault(value, []).append(item.id)
            if not self._by_category:
                raise InputError(f"--negatives category: the items of {self.name} have none of the attributes {', '.join(CATEGORY_FIELDS)}")

    def targets(self, split, seed=0):
        """The (user, position) pairs of a split, in an order that follows from the seed."""
        if not self.splits[split]:
            raise InputError(f"{self.name}: the {split} split is empty; leave-one-out takes users with at least 3 interactions, temporal "
                             f"several points in time (this set has {len(self.sequences)} users)")
        return random.Random(f"{seed}/{split}").sample(self.splits[split], len(self.splits[split]))

    def example(self, target, num_candidates=20, history_length=10, seed=0):
        """Build the list of one target. Raises InputError when the catalogue is too small for the user."""
        user, position = target
        sequence = self.sequences[user]
        rng = random.Random(f"{seed}/{user}/{position}")
        positive = sequence[position]
        touched = {x.item_id for x in sequence}
        if len(self.items) - len(touched) < num_candidates - 1:
            raise InputError(f"{self.name}: {num_candidates} candidates need {num_candidates - 1} items that user {user} never "
                             f"touched, but only {len(self.items) - len(touched)} are left; lower --num-candidates")
        ids = [positive.item_id]
        for drawn in self._proposals(rng, positive.item_id, num_candidates + len(touched)):
            if drawn not in touched:
                touched.add(drawn)
                ids.append(drawn)
                if len(ids) == num_candidates:
                    break
        rng.shuffle(ids)
        past = sequence[max(0, position - history_length):position]
        history = [replace(self.items[x.item_id], rating=x.rating, ago=self._ago(x, positive)) for x in past]
        return self.with_facts(Example(user, history, [self.items[i] for i in ids], [float(i == positive.item_id) for i in ids]))

    def with_facts(self, example):
        return replace(example, candidates=self.facts.beside(example.user, example.history, example.candidates)) if self.facts else example

    def _proposals(self, rng, positive, enough):
        """An endless stream of ids to draw negatives from; the caller passes over what it cannot use."""
        if self.negatives == "popularity":
            for _ in range(100 * enough):  # then uniformly: the user may have touched all that is popular
                yield rng.choices(self._drawn_from, cum_weights=self._cumulative)[0] if self._drawn_from else positive
        elif self.negatives == "category":
            for value in reversed(_categories(self.items[positive])):
                pool = self._by_category[value]
                yield from rng.sample(pool, min(enough, len(pool)))
        while True:
            yield rng.choice(self.item_ids)

    def examples(self, split, num_lists=None, num_candidates=20, history_length=10, seed=0):
        """The first `num_lists` (None: all) lists of a split, in seeded order."""
        return [self.example(t, num_candidates, history_length, seed) for t in self.targets(split, seed)[:num_lists]]

    def training(self):
        """User -> item ids of the training period, oldest first: all that a baseline may learn from."""
        return {u: [x.item_id for x in s[:self.train_length[u]]] for u, s in self.sequences.items() if self.train_length[u]}

    def popularity(self):
        """Item id -> number of interactions in the training period."""
        return Counter(itertools.chain.from_iterable(self.training().values()))

    def texts(self):
        """All the text of the catalogue, an item a line: what a tokenizer may be trained on."""
        return [describe(item) for item in self.items.values()]

    def _ago(self, past, target):
        if not self.has_clock:
            return ""
        days = (target.timestamp - past.timestamp) / 86400
        for unit, length in (("year", 365), ("month", 30), ("week", 7), ("day", 1)):
            if days >= length:
                n = int(days / length)
                return f"{n} {unit}{'s' * (n > 1)} ago"
        return "today"


def _categories(item):
    return next((item.attributes[name] for name in CATEGORY_FIELDS if name in item.attributes), ())


class Facts:
    """What the training period tells about a candidate beside a history (`--facts`), in levels from 0 (nothing) to 9:

        together     how many users had both: sum over the history, the latest first, of DECAY^age n(i, h) / sqrt(n(i) n(h))
        title        words shared with the titles of the history: TF-IDF cosine, summed likewise
        popularity   users who had it, n(i)
        brand, …     for each attribute of the catalogue: items of the history that share a value (a count)

    With `smooth` (`--smooth-facts`), for sparse data, where most pairs of items were never had together:

        together     over paths of two steps: w (B'B)^2, where w has DECAY^age for each item of the history, and B, users by items, has
                     1 / sqrt(n(u) n(i)) where user u had item i, n(u) being the items that u had: LightGCN's matrix
        brand, …     how often such values are had together: sum over the history of DECAY^age sqrt(lift), where for the values a of an
                     item of the history and b of the candidate (of several the last, most special one), with n(a, b) pairs of
                     different items of a user, n(a) = sum_b n(a, b) and p(b) = n(b) / sum n,  lift = n(a, b) / ((n(a) + SHRINK) p(b))

    No level knows its target: the user's own interactions count nowhere. Levels 1 to 9 of what is measured (all but counts) part what is
    above zero evenly, over the positives and as many negatives of 1000 training lists. A level depends on user, history and candidate alone.
    """

    DECAY = 0.8
    SHRINK = 20  # pairs: a value of which little is known goes with none
    MEASURED = ("together", "title", "popularity")

    def __init__(self, dataset, only=False, smooth=False):
        self.only = only  # a prompt shows the facts in the place of history and titles, which are too much for a tiny model
        self.smooth = smooth
        self.training = {user: dict.fromkeys(ids) for user, ids in dataset.training().items()}
        self.users_of = defaultdict(list)  # lists: a sum over a set would depend on the process
        for user, ids in self.training.items():
            for i in ids:
                self.users_of[i].append(user)
        self.names = list(dict.fromkeys([*self.MEASURED, *(name for item in dataset.items.values() for name in item.attributes)]))
        df = Counter(w for item in dataset.items.values() for w in set(_words(item)))
        self.idf = {w: math.log(len(dataset.items) / n) for w, n in df.items()}
        self.measured = self.names if smooth else self.names[:len(self.MEASURED)]
        self.values, self.pairs = {}, {}  # attribute -> item id -> its value; attribute -> (a, b) -> n(a, b), (a, None) -> n(a), None -> their sum
        for name in self.measured[len(self.MEASURED):]:
            self.values[name] = {i: item.attributes[name][-1] for i, item in dataset.items.items() if item.attributes.get(name)}
            self.pairs[name] = Counter()
            for user in self.training:
                self.pairs[name].update(self._pairs(name, user))
        lists = [dataset.example(t, 2) for t in dataset.targets("train")[:1000]]
        rows = [row for e in lists for row in self.measure(e.user, e.history, e.candidates)]
        above = [sorted(filter(None, column)) or [0.0] for column in zip(*rows)]
        self.borders = [[column[len(column) * n // 9] for n in range(1, 9)] for column in above]

    def tfidf(self, item):
        weights = {w: (1 + math.log(n)) * self.idf.get(w, 0.0) for w, n in Counter(_words(item)).items()}
        norm = math.sqrt(sum(x * x for x in weights.values())) or 1.0
        return {w: x / norm for w, x in weights.items()}

    def _pairs(self, name, user):
        """Pairs of different items of a user by their values: {(a, b): n(a, b), (a, None): n(a), None: all}."""
        values = Counter(self.values[name][i] for i in self.training.get(user, ()) if i in self.values[name])
        pairs = Counter({(a, b): n * (m - (a == b)) for a, n in values.items() for b, m in values.items()})
        for (a, _), n in list(pairs.items()):
            pairs[a, None] += n
            pairs[None] += n
        return pairs

    def lifts(self, name, user, history, candidates):
        """What `smooth` says of an attribute, a number a candidate."""
        values, own = self.values[name], self._pairs(name, user)
        n = lambda key: self.pairs[name][key] - own[key]
        told = [(values[h.id], self.DECAY**age) for age, h in enumerate(reversed(history)) if h.id in values]
        lift = lambda a, b: n((a, b)) * n(None) / ((n((a, None)) + self.SHRINK) * max(1, n((b, None))))
        return [sum(w * math.sqrt(lift(a, values[c.id])) for a, w in told) if c.id in values else 0.0 for c in candidates]

    def measure(self, user, history, candidates):
        """[(together, title, popularity, …)] of the candidates, what is `measured`, before it is made levels."""
        own, near, words = self.training.get(user, {}), defaultdict(float), defaultdict(float)
        count = lambda i: max(1, len(self.users_of.get(i, ())) - (i in own))
        for age, item in enumerate(reversed(history)):
            for other in self.users_of.get(item.id, ()):
                near[other] += self.DECAY**age / math.sqrt(count(item.id))
            for w, x in self.tfidf(item).items():
                words[w] += self.DECAY**age * x
        near.pop(user, None)
        if self.smooth:  # one step more: from these users to what they had, and to who had that
            had = defaultdict(float)
            for u, x in near.items():
                for i in self.training[u]:
                    had[i] += x / len(self.training[u]) / count(i)
            others = {u for c in candidates for u in self.users_of.get(c.id, ())} - {user}
            near = {u: sum(had.get(i, 0.0) for i in self.training[u]) / len(self.training[u]) for u in others}
        rows, lifts = [], [self.lifts(name, user, history, candidates) for name in self.values]
        for n, item in enumerate(candidates):
            users = self.users_of.get(item.id, ())
            together = sum(near[u] for u in users if u in near) / math.sqrt(count(item.id))
            title = sum(x * words[w] for w, x in self.tfidf(item).items() if w in words)
            rows.append((together, title, len(users) - (item.id in own), *(column[n] for column in lifts)))
        return rows

    def beside(self, user, history, candidates):
        """The candidates (Items) with their facts. user: None where he is not of this data set."""
        result = []
        for item, row in zip(candidates, self.measure(user, history, candidates)):
            facts = {name: bisect.bisect_right(borders, x) + 1 if x > 0 else 0 for name, x, borders in zip(self.measured, row, self.borders)}
            for name in self.names[len(self.measured):]:
                values = set(item.attributes.get(name, ()))
                facts[name] = min(9, sum(not values.isdisjoint(h.attributes.get(name, ())) for h in history))
            result.append(replace(item, facts=facts, only_facts=self.only))
        return result


@dataclass(frozen=True)
class Scorecard:
    """Points of each fact's level, and the total from which on the evidence speaks for a candidate. See `fit_scorecard`."""

    points: dict[str, list[int]]
    threshold: int


def fit_scorecard(dataset, num_lists=2000, num_candidates=20, history_length=10, nat=2):
    """Weights of evidence of the dataset's facts: log P(level | chosen) / P(level | not chosen) over lists of training, and a list more for
    each level, whose candidates all have it: a level hardly seen says next to nothing. Points: `nat` for each unit (natural logarithm) by
    which a weight exceeds that of its fact's commonest level, rounded; a weight below that one has none."""
    seen = [Counter(), Counter()]  # of the candidates not chosen, chosen
    for e in dataset.examples("train", num_lists, num_candidates, history_length):
        for item, relevance in zip(e.candidates, e.relevance):
            seen[relevance > 0].update(item.facts.items())
    points, common = {}, 0.0  # the log-odds (prior aside) of a candidate of which all is common
    for name in dataset.facts.names:
        no, yes = ([count[name, level] + more for level in range(10)] for count, more in zip(seen, (num_candidates - 1, 1)))
        weights = [math.log(y / sum(yes)) - math.log(n / sum(no)) for y, n in zip(yes, no)]
        usual = weights[max(range(10), key=lambda level: no[level] + yes[level])]
        points[name] = [max(0, round(nat * (w - usual))) for w in weights]
        common += usual
    return Scorecard(points, math.ceil(-nat * common))


def _words(item):
    return re.findall(r"\w+", item.title.lower())


def facts_text(item):
    """` [together 3] [title 0] …`, or nothing."""
    return "".join(f" [{name} {level}]" for name, level in item.facts.items())


def describe(item):
    """One line about an item: `{ago}: {title} (brand / category, rated r) [fact level]…`. Attributes already in the title are left out."""
    title = item.title.lower()
    extra = [", ".join(values[-2:]) for values in item.attributes.values() if values and values[-1].lower() not in title]
    notes = [" / ".join(extra)] if extra else []
    if item.rating is not None:
        notes.append(f"rated {item.rating:g}")
    return (f"{item.ago}: " if item.ago else "") + item.title + (f" ({', '.join(notes)})" if notes else "") + facts_text(item)


def clean(text):
    """One line of printable text: HTML entities resolved, control, format and bidirectional characters dropped, white space
    folded, cut at MAX_TEXT characters. Anything but a string counts as empty."""
    if not isinstance(text, str):
        return ""
    text = html.unescape(text[:20 * MAX_TEXT])
    if not (text.isascii() and text.isprintable()):
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = re.sub(r" +", " ", text).strip()
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT - 1].rstrip() + "…"


def make_item(item_id, title, attributes):
    """An Item of cleaned text. A missing title is replaced by what is known."""
    attributes = {name: tuple(filter(None, map(clean, values))) for name, values in attributes.items()}
    attributes = {name: values for name, values in attributes.items() if values}
    return Item(item_id, clean(title) or clean(" ".join(["untitled", *(v[-1] for v in attributes.values())])), attributes)


# --- loading ------------------------------------------------------------------------------------------------------------

AMAZON_2014 = {"beauty": "Beauty", "toys": "Toys_and_Games", "sports": "Sports_and_Outdoors", "games": "Video_Games",
               "instruments": "Musical_Instruments"}
URL_2014 = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
URL_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/"
URL_MOVIELENS = "https://files.grouplens.org/datasets/movielens/"
SIZES = {  # users, items, interactions as published
    "beauty": (22363, 12101, 198502), "toys": (19412, 11924, 167597), "sports": (35598, 18357, 296337),
    "amazon2023:Video_Games": (94762, 25612, 814586), "ml-100k": (943, 1682, 100000)}
DEFAULT_CACHE = "~/.cache/r2rank"
CACHE_FORMAT = 2  # raised when what is stored changes its meaning


@contextlib.contextmanager
def _without_garbage_collection():
    """Millions of small tuples are made; to look through them for cycles again and again would take longer than to make them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_without_garbage_collection()
def load(name, split=None, seed=0, negatives="uniform", cache_dir=None, mirror=None, skip_bad_lines=False, since=None, until=None,
         core=0, require=(), data_dir=None, history_length=10):
    """Load a data set by name or folder. Raises InputError.

    split: "temporal", "leave-one-out" or None for the source's own default. negatives: see Dataset. cache_dir holds downloads
    and parsed files. mirror: a URL to take the files from instead of their official places. since, until: dates; only
    interactions of since <= time < until are kept. core: keep only users and items with that many interactions, again and again.
    require: names of Amazon metadata fields; items without one of them are dropped with their interactions. data_dir: the folder
    of RecBench+'s files, for "recbench:movie" and "recbench:book", whose queries come with history_length items of history.
    """
    if name == "toy":
        if split:
            raise InputError("--split does not apply to the toy set: its training, validation and test users are different people")
        if since or until or core or require:
            raise InputError("--since, --until, --core and --require do not apply to the toy set; leave them out, or give another --data")
        return replace(toy(seed), negatives=negatives)
    if name.startswith("recbench:"):
        if not data_dir:
            raise InputError(f"--data {name}: give the folder of the benchmark's files with --data-dir. {WHERE}")
        if split or since or until or core or require or skip_bad_lines or negatives != "uniform":
            raise InputError("--split, --since, --until, --core, --require, --skip-bad-lines and --negatives do not apply to RecBench+'s files; leave them out")
        bench = load_recbench(data_dir, name.partition(":")[2], history_length)
        return Dataset(name.replace(":", "-"), bench.items, {}, {"train": [], "validation": [], "test": []}, {}, bench=bench)
    cache = Path(cache_dir or DEFAULT_CACHE).expanduser()
    default = "leave-one-out"
    if name in AMAZON_2014:
        category = AMAZON_2014[name]
        files = [fetch(URL_2014 + f, cache / "amazon-2014", mirror) for f in (f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz")]
        read = read_amazon_2014
    elif name.startswith("amazon2023:"):
        category, default = name.partition(":")[2], "temporal"
        if not re.fullmatch(r"[A-Za-z0-9_]+", category):
            raise InputError(f"--data {name}: give a category of Amazon Reviews 2023, such as amazon2023:Video_Games")
        files = [fetch(URL_2023 + f, cache / "amazon-2023", mirror) for f in
                 (f"benchmark/5core/rating_only/{category}.csv.gz", f"raw/meta_categories/meta_{category}.jsonl.gz")]
        read = read_amazon_2023
    elif name in ("ml-100k", "ml-1m"):
        files, default = [fetch(f"{URL_MOVIELENS}{name}.zip", cache / "movielens", mirror)], "temporal"
        read = read_ml_100k if name == "ml-100k" else read_ml_1m
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(f"--data {name}: no such folder. Give toy, {', '.join(AMAZON_2014)}, amazon2023:CATEGORY, ml-100k, ml-1m, "
                             f"recbench:movie, recbench:book, or a folder with NAME.inter and NAME.item (RecBole atomic files)")
        files, read = atomic_files(folder), read_recbole
    if require and "amazon" not in read.__name__:
        raise InputError("--require: only the Amazon sets have metadata fields to require")
    label = files[0].stem if read is read_recbole else name

    bad = BadLines(skip_bad_lines)
    raw = cached(cache / "parsed", label, files, [sorted(require), skip_bad_lines], bad, lambda: read(*files, bad=bad, require=tuple(require)))
    bad.report()
    sizes = (len(raw.sequences), len(raw.items), sum(map(len, raw.sequences.values())))
    if name in SIZES and sizes != SIZES[name] and not require:
        print(f"note: {name} has {sizes[0]} users, {sizes[1]} items and {sizes[2]} interactions here; published are "
              f"{' / '.join(map(str, SIZES[name]))}", file=sys.stderr)
    if since or until or core:
        raw = restrict(label, raw, since, until, core)
    split = split or default
    if split == "temporal" and not raw.has_clock:
        raise InputError(f"{label}: --split temporal needs real timestamps; here they are missing or only count a user's "
                         f"interactions. Use --split leave-one-out")
    splits, train_length = (split_temporal if split == "temporal" else split_leave_one_out)(raw.sequences)
    return Dataset(label, raw.items, raw.sequences, splits, train_length, raw.has_clock, raw.users, negatives)


class Raw(NamedTuple):
    """What a reader returns: the catalogue, and each user's interactions in time order."""

    items: dict[str, Item]
    sequences: dict[str, list[Interaction]]
    has_clock: bool
    users: dict[str, dict[str, str]]


def restrict(label, raw, since, until, core):
    """A time window, then the k-core: users and items with at least `core` interactions, until nothing more falls out."""
    try:
        dates = [datetime.fromisoformat(d) if d else None for d in (since, until)]
        first, last = (d and (d if d.tzinfo else d.replace(tzinfo=timezone.utc)).timestamp() for d in dates)
    except ValueError as error:
        raise InputError(f"--since, --until: expected a date such as 2021-06-30 ({error})") from None
    if (since or until) and not raw.has_clock:
        raise InputError(f"{label}: --since and --until need real timestamps, which this set does not have")
    sequences = {u: [x for x in s if (first is None or x.timestamp >= first) and (last is None or x.timestamp < last)]
                 for u, s in raw.sequences.items()}
    before = None
    while core and before != (before := sum(map(len, sequences.values()))):
        counts = Counter(x.item_id for s in sequences.values() for x in s)
        sequences = {u: [x for x in s if counts[x.item_id] >= core] for u, s in sequences.items()}
        sequences = {u: s for u, s in sequences.items() if len(s) >= core}
    sequences = {u: s for u, s in sequences.items() if s}
    if not sequences:
        raise InputError(f"{label}: --since, --until and --core together leave no interaction")
    left = {x.item_id for s in sequences.values() for x in s}
    return raw._replace(sequences=sequences, items={i: x for i, x in raw.items.items() if i in left})


def cached(folder, label, files, options, bad, parse):
    """parse(), or what it returned the last time for the very same files and options. A folder that cannot be written is no error."""
    stamp = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, MAX_TEXT, stamp, options]).encode()).hexdigest()[:16]
    path = folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', label)}-{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        stored = json.loads(path.read_text())
        raw = _unpack(stored)
        bad.counts, bad.first = stored["skipped"]  # to be reported every time
        return raw
    raw = parse()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(_pack(raw) | {"skipped": [bad.counts, bad.first]}, separators=(",", ":")))
        temporary.replace(path)
    return raw


def _pack(raw):
    index = {i: n for n, i in enumerate(raw.items)}
    rows = list(itertools.chain.from_iterable(raw.sequences.values()))
    return {"items": [[x.id, x.title, x.attributes] for x in raw.items.values()], "users": raw.users, "has_clock": raw.has_clock,
            "lengths": {u: len(s) for u, s in raw.sequences.items()}, "item": [index[x.item_id] for x in rows],
            "timestamp": [x.timestamp for x in rows], "rating": [x.rating for x in rows]}


def _unpack(stored):
    items = {i: Item(i, title, {k: tuple(v) for k, v in attributes.items()}) for i, title, attributes in stored["items"]}
    ids = list(items)
    rows = map(Interaction, map(ids.__getitem__, stored["item"]), stored["timestamp"], stored["rating"])
    sequences = {user: list(itertools.islice(rows, n)) for user, n in stored["lengths"].items()}
    return Raw(items, sequences, stored["has_clock"], stored["users"])


# --- splits ---------------------------------------------------------------------------------------------------------


def split_leave_one_out(sequences):
    splits = {"train": [], "validation": [], "test": []}
    train_length = {}
    for user, sequence in sequences.items():
        n = len(sequence)
        train_length[user] = n - 2 if n >= 3 else n
        splits["train"] += [(user, p) for p in range(1, train_length[user])]
        if n >= 3:
            splits["validation"].append((user, n - 2))
            splits["test"].append((user, n - 1))
    return splits, train_length


def split_temporal(sequences, train=0.8, validation=0.1):
    """Borders in time such that `train` and `validation` of the examples lie before them, in whole timestamps."""
    times = sorted(x.timestamp for s in sequences.values() for x in s[1:])
    if not times:
        return {"train": [], "validation": [], "test": []}, {u: len(s) for u, s in sequences.items()}
    first, second = (times[min(int(len(times) * f), len(times) - 1)] for f in (train, train + validation))
    splits = {"train": [], "validation": [], "test": []}
    train_length = {}
    for user, sequence in sequences.items():
        train_length[user] = sum(x.timestamp < first for x in sequence)
        for p in range(1, len(sequence)):
            t = sequence[p].timestamp
            splits["train" if t < first else "validation" if t < second else "test"].append((user, p))
    return splits, train_length


# --- candidate lists as files ------------------------------------------------------------------------------------------


def save_lists(path, examples):
    """JSONL, a list a line: user, history, candidates (item ids), relevance; where known also ago and ratings of the history."""
    with open(path, "w", encoding="utf-8") as f:
        for e in examples:
            record = {"user": e.user, "history": [x.id for x in e.history], "candidates": [x.id for x in e.candidates],
                      "relevance": [int(y) if y == int(y) else y for y in e.relevance]}
            if any(x.ago for x in e.history):
                record["ago"] = [x.ago for x in e.history]
            if any(x.rating is not None for x in e.history):
                record["ratings"] = [x.rating for x in e.history]
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lists(path, items):
    """The examples of a JSONL that save_lists, or another program, wrote. Raises InputError with the line."""
    examples = []
    for number, line in read_lines(path, BadLines()):
        try:
            record = json.loads(line)
            ids, relevance, past = record["candidates"], [float(y) for y in record["relevance"]], record.get("history", [])
            ago, ratings = (record.get(k, [default] * len(past)) for k, default in (("ago", ""), ("ratings", None)))
            history = [replace(items[i], ago=clean(a), rating=None if r is None else float(r))
                       for i, a, r in zip(past, ago, ratings, strict=True)]
            example = Example(f"line {number}" if record.get("user") is None else str(record["user"]), history, [items[i] for i in ids], relevance)
        except KeyError as error:
            raise InputError(f"{path} line {number}: {error} is neither there nor an item of the catalogue") from None
        except MALFORMED as error:
            raise InputError(f"{path} line {number}: expected {{\"user\", \"history\": [ids], \"candidates\": [ids], \"relevance\": "
                             f"[numbers]}}; {type(error).__name__}: {error}") from None
        if len(relevance) != len(ids) or len(set(ids)) != len(ids) or len(ids) < 2 or not all(0 <= y < 100 for y in relevance) or not any(relevance):
            raise InputError(f"{path} line {number}: expected at least 2 different candidates and one relevance >= 0 for each, some of "
                             f"them relevant")
        examples.append(example)
    if not examples:
        raise InputError(f"{path}: no lists in it")
    return examples


# --- downloads ----------------------------------------------------------------------------------------------------------


def fetch(url, folder, mirror=None, timeout=30, patience=3):
    """The local path of a file, downloaded once. Raises InputError, naming the URL and where to put the file by hand.

    It arrives in a .part file, which a later try or process resumes; it takes its name when its length is the announced one and
    its gzip or zip checksums hold. A lock keeps two processes from writing it at once. Gives up after `patience` tries that
    brought nothing new.
    """
    path = Path(folder) / url.rpartition("/")[2]
    if path.exists():
        return path
    url = f"{mirror.rstrip('/')}/{path.name}" if mirror else url
    by_hand = f"If this machine has no way to it, download {url} elsewhere and put it at {path}"
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(path.name + ".lock")):
            misses = 0
            while not path.exists():  # the process that held the lock before may have finished the work
                size = part.stat().st_size if part.exists() else 0
                try:
                    _download(url, part, timeout)
                    _verify(part, path.name)
                    part.replace(path)
                except urllib.error.HTTPError as error:
                    if error.code < 500 and error.code not in (408, 416, 429):
                        raise InputError(f"{url}: the server answers {error.code} {error.reason}. {by_hand}") from None
                    failure = error
                except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError, Incomplete) as error:
                    failure = error
                except ValueError as error:
                    raise InputError(f"{url} is not a URL to download from ({error}). {by_hand}") from None
                else:
                    return path
                progress = part.exists() and part.stat().st_size > size
                misses = 0 if progress else misses + 1
                if misses >= patience:
                    raise InputError(f"{url} could not be downloaded: {failure}. {by_hand}") from None
                time.sleep(min(0.2 * 2**misses, 5))
    except OSError as error:  # not the network: those are above
        raise InputError(f"{path}: {error}. Choose another folder with --cache-dir") from None
    return path


class Incomplete(Exception):
    """A download that is short or damaged."""


@contextlib.contextmanager
def _lock(path):
    with open(path, "w") as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a file system without locks: then only one process at a time, please
            pass
        yield


def _download(url, part, timeout):
    """Add to `part` what it still lacks. Raises Incomplete when the connection ends before the announced length."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "r2rank", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what we have: it is whole, or not that file
            if error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
                return
            part.unlink()
        raise
    with response:
        if have and not (response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")):
            if response.status == 206:  # another piece than the one asked for
                part.unlink()
                raise Incomplete("the server sent the wrong range")
            have = 0  # it cannot resume, and sends the whole file
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        with open(part, "ab" if have else "wb") as f, tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True) as bar:
            while block := _read(response):
                f.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise Incomplete(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _read(response):
    try:
        return response.read1(1 << 18)
    except OSError as error:  # of the network: told apart here from one of the disk
        raise Incomplete(f"the connection broke off ({error})") from None


def _verify(part, name):
    """Raise Incomplete when the archive's own checksums do not hold. A cut one is kept, to be resumed; a damaged one is deleted."""
    try:
        if not part.stat().st_size:  # gzip takes nothing at all for a whole file
            raise EOFError("it is empty")
        if name.endswith(".gz"):
            with gzip.open(part) as f:
                while f.read(1 << 22):
                    pass
        elif name.endswith(".zip"):
            with open(part, "rb") as f:
                if f.read(4) == b"PK\3\4" and not zipfile.is_zipfile(part):
                    raise EOFError("the directory at its end is missing")
            with zipfile.ZipFile(part) as z:
                if z.testzip():
                    raise zipfile.BadZipFile(f"{z.testzip()} is damaged")
    except EOFError as error:
        raise Incomplete(f"the file is cut off ({error})") from None
    except (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        part.unlink()
        raise Incomplete(f"what arrived is damaged ({error})") from None


# --- reading files --------------------------------------------------------------------------------------------------------

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError, RecursionError, MemoryError, OverflowError)


class BadLines:
    """What to do with a line that cannot be read: an InputError, or with skip, count it and report at the end."""

    def __init__(self, skip=False):
        self.skip, self.counts, self.first = skip, Counter(), {}

    def __call__(self, path, number, message):
        text = f"{path} line {number}: {message}"
        if not self.skip:
            raise InputError(f"{text}. --skip-bad-lines passes over such lines")
        self.counts[str(path)] += 1
        self.first.setdefault(str(path), text)

    def report(self):
        for path, count in self.counts.items():
            print(f"skipped {count} bad line{'s' * (count > 1)} of {path}; the first: {self.first[path]}", file=sys.stderr)


def read_lines(path, bad, member=None, encoding="utf-8"):
    """(number, text) of each line that is not empty; path may be gzipped, or a zip of which `member` is read."""
    where = f"{path}:{member}" if member else path
    try:
        with contextlib.ExitStack() as stack:
            if member:
                f = stack.enter_context(zipfile.ZipFile(path).open(member))
            else:
                f = stack.enter_context(gzip.open(path) if str(path).endswith(".gz") else open(path, "rb"))
            f = io.BufferedReader(f, 1 << 20)
            lines = enumerate(iter(lambda: f.readline(MAX_LINE), b""), start=1)
            for number, line in tqdm(lines, desc=f"reading {Path(path).name}", unit=" lines", delay=2, leave=False):
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while (rest := f.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    bad(where, number, f"longer than {MAX_LINE} bytes")
                elif (text := line.decode(encoding, errors="replace").strip("\r\n\ufeff")).strip():
                    yield number, text
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{where}: cannot be read ({error})") from None


def number_of(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def id_of(value):
    if not (isinstance(value, str) and value):
        raise TypeError(f"{value!r:.40} is not an id")
    return value


def in_time_order(sequences):
    """Each user's interactions by time. Where there are times, the very same row twice (user, item, second, rating) is one."""
    for sequence in sequences.values():
        if any(x.timestamp for x in sequence):
            sequence[:] = dict.fromkeys(sequence)
        sequence.sort(key=lambda x: x.timestamp)  # stable: ties keep the file's order
    return sequences


# --- Amazon ---------------------------------------------------------------------------------------------------------------

ASIN = re.compile(r"""['"](?:parent_)?asin['"]\s*:\s*['"]([^'"]+)['"]""")
RELATED = re.compile(r"""'related': \{[^{}]*\}""")  # long lists of other products, nine tenths of a line


def read_amazon_2014(reviews, meta, bad, require=()):
    """Reviews as JSON lines; metadata as one Python literal a line (asin, title, brand, categories: any may be missing)."""
    sequences = {}
    for number, line in read_lines(reviews, bad):
        try:
            r = json.loads(line)
            user, row = id_of(r["reviewerID"]), Interaction(id_of(r["asin"]), number_of(r["unixReviewTime"]), number_of(r["overall"]))
        except MALFORMED as error:
            bad(reviews, number, f"expected a JSON object with reviewerID, asin, overall, unixReviewTime; {type(error).__name__}: {error}")
            continue
        sequences.setdefault(user, []).append(row)

    def parse(line):
        with contextlib.suppress(*MALFORMED):
            return ast.literal_eval(RELATED.sub("'related': {}", line, count=1))
        return ast.literal_eval(line)

    return _amazon(sequences, meta, parse, "a Python literal {'asin': …, 'title': …}", "asin", "brand", bad, require)


def read_amazon_2023(ratings, meta, bad, require=()):
    """Ratings as CSV (user_id,parent_asin,rating,timestamp in ms); metadata as JSON lines (parent_asin, title, store, categories, …)."""
    sequences, expected = {}, "user_id,parent_asin,rating,timestamp"
    for number, line in read_lines(ratings, bad):
        if number == 1:
            if line.strip() != expected:
                raise InputError(f"{ratings} line 1: expected the header {expected}, found {line[:80]!r}")
            continue
        try:
            user, item, rating, milliseconds = line.split(",")
            row = Interaction(id_of(item), number_of(milliseconds) / 1000, number_of(rating))
        except MALFORMED as error:
            bad(ratings, number, f"expected {expected}; {error}")
            continue
        sequences.setdefault(user, []).append(row)
    return _amazon(sequences, meta, json.loads, 'a JSON object {"parent_asin": …, "title": …}', "parent_asin", "store", bad, require)


def _amazon(sequences, meta, parse, expected, id_field, brand_field, bad, require):
    wanted = {x.item_id for s in sequences.values() for x in s}
    items = {}
    for number, line in read_lines(meta, bad):
        found = ASIN.findall(line)
        if found and wanted.isdisjoint(found):
            continue  # most of the file: products outside the 5-core
        try:
            record = parse(line)
            item_id, path = id_of(record[id_field]), record.get("categories")
            path = path if isinstance(path, list) else []
            path = path[0] if path and isinstance(path[0], list) else path  # 2014: a list of paths
            missing = [name for name in require if record.get(name) in (None, "", [], {})]
            item = make_item(item_id, record.get("title"), {"brand": [record.get(brand_field)], "categories": path[1:] or path})
        except MALFORMED as error:
            bad(meta, number, f"expected {expected}; {type(error).__name__}: {str(error)[:80]}")
            continue
        if item_id in wanted and not missing:
            items[item_id] = item
    if require:
        sequences = {u: kept for u, s in sequences.items() if (kept := [x for x in s if x.item_id in items])}
        wanted = {x.item_id for s in sequences.values() for x in s}
        if not sequences:
            raise InputError(f"--require {','.join(require)}: no item of {meta} has all of these fields")
    items = {i: items.get(i) or make_item(i, "", {}) for i in sorted(wanted)}
    return Raw(items, in_time_order(sequences), True, {})


# --- MovieLens --------------------------------------------------------------------------------------------------------------

GENRES = ("unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|Mystery|"
          "Romance|Sci-Fi|Thriller|War|Western").split("|")
AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56 or older"}
OCCUPATIONS = ("other|educator|artist|clerical worker|college student|customer service worker|doctor|executive|farmer|homemaker|K-12 student|"
               "lawyer|programmer|retired|salesperson|scientist|self-employed|technician|tradesperson|unemployed|writer").split("|")


def read_ml_100k(archive, bad, require=()):
    def movie(f):
        return f[0], f[1], [name for name, flag in zip(GENRES, f[5:]) if flag == "1" and name != "unknown"]

    return _movielens(archive, "ml-100k", ("u.data", "\t", 4), ("u.item", "|", 24), ("u.user", "|", 5), bad, movie,
                      lambda f: (f[0], {"age": f[1], "gender": f[2], "occupation": f[3], "zip_code": f[4]}))


def read_ml_1m(archive, bad, require=()):
    return _movielens(archive, "ml-1m", ("ratings.dat", "::", 4), ("movies.dat", "::", 3), ("users.dat", "::", 5), bad,
                      lambda f: (f[0], f[1], f[2].split("|")),
                      lambda f: (f[0], {"age": AGES.get(f[2], f[2]), "gender": f[1], "occupation": OCCUPATIONS[int(f[3])], "zip_code": f[4]}))


def _movielens(archive, folder, ratings, movies, people, bad, movie, person):
    def rows(file, separator, width):
        member = f"{folder}/{file}"
        for number, line in read_lines(archive, bad, member, encoding="latin-1"):
            fields = line.split(separator)
            if len(fields) != width:
                bad(f"{archive}:{member}", number, f"expected {width} fields separated by {separator!r}, found {len(fields)}")
                continue
            yield number, fields

    def parsed(part, parse, expected):
        for number, fields in rows(*part):
            try:
                yield parse(fields)
            except MALFORMED as error:
                bad(f"{archive}:{folder}/{part[0]}", number, f"expected {expected}; {error}")

    items = {i: make_item(i, title, {"genre": genres}) for i, title, genres in parsed(movies, movie, "a movie with title and genres")}
    users = dict(parsed(people, person, "a user with age, gender, occupation, zip code"))
    sequences = {}

    def rating(f):
        if f[1] not in items:
            raise ValueError(f"movie {f[1]!r} is not in {movies[0]}")
        return f[0], Interaction(f[1], number_of(f[3]), number_of(f[2]))

    for user, row in parsed(ratings, rating, "user, movie, rating, time in seconds"):
        sequences.setdefault(user, []).append(row)
    return Raw(items, in_time_order(sequences), True, users)


# --- RecBole atomic files --------------------------------------------------------------------------------------------


def read_atomic(path, required, bad):
    """A tab-separated file with a typed header (`field:type`): the types, and an iterator over (line number, {field: text})."""
    lines = read_lines(path, bad)
    header = next(lines, (1, ""))[1].split("\t")
    types = {}
    for cell in header if header != [""] else ():
        name, _, kind = cell.partition(":")
        if kind not in ("token", "token_seq", "float", "float_seq"):
            raise InputError(f"{path} line 1: expected `field:type` with type token, token_seq or float, found {cell[:40]!r}")
        types[name] = kind
    if 0 < len(types) < len(header):
        raise InputError(f"{path} line 1: a column is named twice")
    for name in required:
        if name not in types:
            raise InputError(f"{path}: no column `{name}`; it has {', '.join(types) or 'none'}")

    def rows():
        for number, line in lines:
            row = line.split("\t")
            if len(row) != len(header):
                bad(path, number, f"expected {len(header)} fields, found {len(row)}")
            else:
                yield number, dict(zip(types, row))

    return types, rows()


def _companion(path, suffix):
    """NAME.suffix beside NAME.inter, whatever dots the name has."""
    return path.with_name(path.name.removesuffix(".inter") + suffix)


def atomic_files(folder):
    """[NAME.inter, NAME.item] and those of .user, .kg, .link that are there."""
    found = list(folder.glob("*.inter"))
    if len(found) != 1:
        raise InputError(f"{folder}: expected one NAME.inter file, found {len(found)}")
    files = {suffix: _companion(found[0], suffix) for suffix in (".inter", ".item", ".user", ".kg", ".link")}
    if not files[".item"].exists():
        raise InputError(f"{folder}: {found[0].name} is there, but {files['.item'].name} (the catalogue: item_id, title, …) is missing")
    return [path for path in files.values() if path.exists()]


def read_recbole(interactions, *others, bad, require=()):
    items = _read_items(interactions, bad)
    sequences, has_clock = _read_interactions(interactions, items, bad)
    users = {}
    if _companion(interactions, ".user") in others:
        _, rows = read_atomic(_companion(interactions, ".user"), ["user_id"], bad)
        users = {row.pop("user_id"): {k: clean(v) for k, v in row.items()} for _, row in rows}
    return Raw(items, sequences, has_clock, users)


def _read_items(interactions, bad):
    path = _companion(interactions, ".item")
    types, rows = read_atomic(path, ["item_id"], bad)
    title_field = "title" if "title" in types else next((n for n in types if "title" in n or n == "name"), None)
    if title_field is None:
        raise InputError(f"{path.name}: no title column (`title`, `movie_title` or `name`); it has {', '.join(types)}")
    features = [n for n, kind in types.items() if n not in ("item_id", title_field) and kind.startswith("token")]
    knowledge = _read_knowledge(_companion(interactions, ".kg"), _companion(interactions, ".link"), bad)
    items = {}
    for _, row in rows:
        attributes = {}
        for name in features:
            if "|" in row[name]:
                values = row[name].split("|")
            else:
                values = row[name].split(" ") if types[name] == "token_seq" else [row[name]]
            attributes[name] = tuple(filter(None, map(clean, values)))
        for relation, values in knowledge.get(row["item_id"], {}).items():
            if values not in attributes.values():  # the same genres under two names would only lengthen the prompt
                attributes[relation] = values
        items[row["item_id"]] = make_item(row["item_id"], row[title_field], attributes)
    return items


def _read_knowledge(graph, link, bad):
    """NAME.kg + NAME.link, where both are there: item id -> {relation: the names it leads to}."""
    if not (graph.exists() and link.exists()):
        return {}
    item_of = {row["entity_id"]: row["item_id"] for _, row in read_atomic(link, ["item_id", "entity_id"], bad)[1]}
    knowledge = {}
    for _, row in read_atomic(graph, ["head_id", "relation_id", "tail_id"], bad)[1]:
        if row["head_id"] in item_of and (value := clean(row["tail_id"])):
            relations = knowledge.setdefault(item_of[row["head_id"]], {})
            relations[row["relation_id"]] = relations.get(row["relation_id"], ()) + (value,)
    return knowledge


def _read_interactions(path, items, bad):
    types, rows = read_atomic(path, ["user_id", "item_id"], bad)
    sequences = {}
    for number, row in rows:
        if row["item_id"] not in items:
            bad(path, number, f"item {row['item_id']!r} is not in {_companion(path, '.item').name}")
            continue
        try:
            timestamp = number_of(row.get("timestamp") or 0)
            rating = number_of(row["rating"]) if row.get("rating") else None
        except ValueError:
            bad(path, number, "timestamp and rating must be numbers")
            continue
        sequences.setdefault(row["user_id"], []).append(Interaction(row["item_id"], timestamp, rating))
    in_time_order(sequences)
    # Some published files carry a position (1, 2, …) instead of a time: good for order, not across users.
    has_clock = "timestamp" in types and any(x.timestamp > 1e6 for s in sequences.values() for x in s)
    if has_clock and max(s[-1].timestamp for s in sequences.values()) > 1e11:  # milliseconds
        sequences = {u: [x._replace(timestamp=x.timestamp / 1000) for x in s] for u, s in sequences.items()}
    return sequences, has_clock


# --- the toy shop ------------------------------------------------------------------------------------------------------

TOY = {
    "brand": "Avelle Borealis Cassia Dovena Elmira Fjord Ginkgo Halcyon Isolde Juno Kestrel Lumora".split(),
    "kind": "cleanser cream lipstick lotion mascara mask perfume polish powder serum shampoo soap".split(),
    "scent": "almond cedar citrus coconut ginger jasmine lavender mint rose vanilla".split(),
}


TASTE = {"brand": 3.5, "kind": 4.5, "scent": 4.5}  # log-odds that a favourite adds to an item's chance of being chosen


def toy(seed=0, num_items=400, num_users=600):
    """A small shop whose users have two favourite brands, kinds and scents each, and mostly buy what meets several.

    Of the users, 60% are for training (14 purchases each), 10% for validation and 30% for test (11 each). The first ten
    are always the history. One purchase in 25 is a whim, drawn uniformly, and items differ in appeal.
    """
    rng = random.Random(f"toy/{seed}")
    combinations = [(b, k, s) for b in TOY["brand"] for k in TOY["kind"] for s in TOY["scent"]]
    items = {}
    for n, (brand, kind, scent) in enumerate(rng.sample(combinations, num_items)):
        attributes = {"brand": (brand,), "kind": (kind,), "scent": (scent,)}
        items[f"T{n:03d}"] = Item(f"T{n:03d}", f"{brand} {scent} {kind}", attributes)
    appeal = {i: rng.gauss(0, 0.5) for i in items}
    sequences, splits, train_length = {}, {"train": [], "validation": [], "test": []}, {}
    for n in range(num_users):
        user = f"u{n:03d}"
        taste = {name: set(rng.sample(values, 2)) for name, values in TOY.items()}
        split = "train" if n < 0.6 * num_users else "validation" if n < 0.7 * num_users else "test"
        length = 14 if split == "train" else 11
        weight = {i: math.exp(appeal[i] + sum(w for a, w in TASTE.items() if x.attributes[a][0] in taste[a]))
                  for i, x in items.items()}
        chosen = []
        while len(chosen) < length:
            left = [i for i in items if i not in chosen]
            whim = rng.random() < 0.04
            chosen.append(rng.choice(left) if whim else rng.choices(left, [weight[i] for i in left])[0])
        rng.shuffle(chosen)  # a user's best matches go first: shuffled, the target is no harder than the history
        sequences[user] = [Interaction(i, float(t)) for t, i in enumerate(chosen)]
        train_length[user] = length if split == "train" else 0
        splits[split] += [(user, p) for p in range(10, length)]
    return Dataset("toy", items, sequences, splits, train_length)


# --- queries ------------------------------------------------------------------------------------------------------------

KINDS = ("explicit", "implicit", "misinformed", "interest", "demographics")

WORDING = {  # attribute -> what its value is called, and how a value is asked for; others are called by their own name
    "directed_by": ("director", "directed by {}"), "written_by": ("writer", "written by {}"), "starring": ("actor", "starring {}"),
    "genre": ("genre", "of the genre {}"), "class": ("genre", "of the genre {}"), "genres": ("genre", "of the genre {}"),
    "brand": ("brand", "from the brand {}"), "categories": ("category", "from the category {}"),
    "release_year": ("year", "from the year {}"),
}

# Eight templates a kind for training and validation, four others for test. {} is where the conditions stand.
TEMPLATES = {
    "explicit": (
        "I am looking for something {}.", "Can you recommend something {}?", "Please suggest an item {}.",
        "What would you recommend {}?", "I want something {}.", "Find me an item {}.", "Do you have something {}?",
        "I would like to try something {}."),
    "explicit test": (
        "Could you find something {} for me?", "I would like an item {}, please.", "Please recommend me something {}.",
        "Do you have an item {} to suggest?"),
    "implicit": (
        "I am looking for something {}.", "Can you find an item {}?", "I want something new {}.", "What do you have {}?",
        "Please recommend something {}.", "Is there an item {}?", "I would love to try something {}.",
        "Suggest something {}, please."),
    "implicit test": (
        "Please find me something {}.", "I would like to try an item {}.", "Can you suggest something new {}?",
        "Do you have something {} for me?"),
    "misinformed": (
        "I am looking for something {}.", "Can you recommend an item {}?", "I want another item {}.", "Please find something {}.",
        "What else is there {}?", "Do you know something {}?", "I would like something more {}.", "Suggest an item {}."),
    "misinformed test": (
        "Can you find me another item {}?", "Please suggest something more {}.", "Do you have something else {}?",
        "I would like an item {}."),
    "interest": (
        "I like {}. What else would I like?", "I enjoyed {}. Can you recommend something like that?",
        "Lately I chose {}. Please suggest something similar.", "My favourites are {}. Find me another like them.",
        "I am fond of {}. What should I try next?", "Having tried {}, I want more of the same.",
        "I bought {} and liked both. What would you recommend?", "Recommend something similar to {}."),
    "interest test": (
        "I tried {} and enjoyed both. Please recommend another.", "What would you suggest to me if I like {}?",
        "My choice was {}. Can you find something similar?", "I want something like {}."),
    "demographics": (
        "About me: {}. What would you recommend?", "My profile is {}. Please suggest something.",
        "What do people like me choose? I am: {}.", "Find something for a person with {}.",
        "Can you recommend something for somebody with {}?", "I would describe myself as {}. What should I try?",
        "A friend of mine is {}. What would suit this person?", "Suggest something that fits a person with {}."),
    "demographics test": (
        "What would suit me? About me: {}.", "Please recommend something for a person with {}.",
        "I am: {}. Can you suggest something?", "Somebody like me, {}, would choose what?"),
}


@dataclass(frozen=True)
class Query:
    """One request to the assistant with its candidates."""

    id: str  # unique and stable: the curriculum's key
    text: str
    kind: str  # explicit, implicit, misinformed, interest, demographics
    num_conditions: int
    candidates: list[Item]
    truths: tuple[str, ...]  # ids of the right items, all of them among the candidates
    user: str = ""
    history: list[Item] = field(default_factory=list)
    conditions: tuple[tuple[str, str], ...] = ()  # (attribute, value) pairs that a right item has, where they are known
    titles: tuple[str, ...] = ()  # RecBench+: all right titles as the benchmark writes them, for open-ended answers


def facts_of(item):
    """The (attribute, value) pairs of an item, in order, each once."""
    return list(dict.fromkeys((name, value) for name, values in item.attributes.items() for value in values))


class QueryBuilder:
    """Queries for any catalogue with attributes (METHODS §2; ours, not RecBench+'s). Raises InputError for kinds it cannot serve.

    The positive is an interaction to predict of the split, so nothing held out can be a training positive; what the user
    touches after it, or ever, is neither a negative nor named. Conditions are attribute values of the positive that at least
    three items and at most half of the catalogue have; a negative lacks at least one of them, and about `near_misses` of the
    negatives meet at least one (so, of two conditions, all but one). The kinds:
      explicit      the values themselves
      implicit      each value by items that have it: one, or two whose only common value of that attribute it is
      misinformed   the first value by an item that has it, with a wrong value stated for that item; the others themselves
      interest      two items of the user's past; the conditions are what they have in common, all of which the positive has
      demographics  what is known about the user (fields with at most 100 different values); no conditions
    """

    def __init__(self, dataset, kinds=None, max_conditions=3, num_candidates=20, history_length=10, near_misses=0.25, seed=0):
        self.dataset, self.num_candidates, self.history_length, self.seed = dataset, num_candidates, history_length, seed
        self.max_conditions, self.near_misses = max_conditions, near_misses
        self.keys = {i: title_key(item.title) for i, item in dataset.items.items()}  # two items of one title cannot be told apart
        self.with_fact = {}
        for item in dataset.items.values():
            for fact in facts_of(item):
                self.with_fact.setdefault(fact, []).append(item.id)
        self.with_fact = {f: ids for f, ids in self.with_fact.items() if 3 <= len(ids) <= len(dataset.items) // 2}
        self.facts = {i: [f for f in facts_of(item) if f in self.with_fact] for i, item in dataset.items.items()}
        self.values = {}
        for name, value in self.with_fact:
            self.values.setdefault(name, []).append(value)
        profiles = dataset.users.values()
        names = dict.fromkeys(name for profile in profiles for name in profile)
        self.profile_fields = [n for n in names if 1 < len({p.get(n) for p in profiles}) <= 100]
        served = [k for k in KINDS if (self.profile_fields if k == "demographics" else self.with_fact)]
        self.kinds = tuple(kinds or served)
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"query kind {kind!r}: choose from {', '.join(KINDS)}")
            if kind == "demographics" and kind not in served:
                raise InputError(f"{dataset.name}: demographics queries need a file of users with fields such as age or occupation "
                                 f"(NAME.user; ml-100k and RecBench+ have them); the other kinds need none")
            if kind not in served:
                raise InputError(f"{dataset.name}: {kind} queries need items with attributes that several items share (in NAME.item or "
                                 f"NAME.kg); here there are none. The toy, ml-100k, Amazon's sets and RecBench+ have them")
        if not self.kinds:
            raise InputError(f"{dataset.name}: queries need items with attributes that several share, or users with fields; it has "
                             f"neither. The toy, ml-100k, Amazon's sets and RecBench+ have them")

    def graph_items(self):
        """The items with all that is known of them: what the item-attribute graph is made of."""
        return self.dataset.items.values()

    def draw(self, split, count, start=0):
        """`count` queries, the kinds in turn; the same for the same (seed, split). start: the first round over the targets, so
        that different ranges of it give different queries. Raises InputError where a kind finds no query."""
        streams = {kind: self._stream(kind, split, start) for kind in self.kinds}
        return [next(streams[self.kinds[n % len(self.kinds)]]) for n in range(count)]

    def _stream(self, kind, split, start):
        targets = self.dataset.targets(split, f"{self.seed}/{kind}/{start}")
        for number in range(start, start + 10**6):
            found = False
            for target in targets:
                if query := self.query(kind, split, target, number):
                    found = True
                    yield query
            if not found:
                raise InputError(f"{self.dataset.name}: none of its {len(targets)} {split} examples gives a query of kind {kind}; "
                                 f"leave that kind out, or lower --num-candidates")

    def query(self, kind, split, target, number=0):
        """The `number`-th query of a (user, position) target, or None where it gives none of this kind."""
        user, position = target
        rng = random.Random(f"{self.seed}/query/{split}/{user}/{position}/{kind}/{number}")
        items, sequence = self.dataset.items, self.dataset.sequences[user]
        positive = items[sequence[position].item_id]
        touched = {x.item_id for x in sequence}
        past = [items[x.item_id] for x in sequence[max(0, position - self.history_length):position] if x.item_id != positive.id]
        facts, wrong = self.facts[positive.id], None
        if kind == "demographics":
            fields = [n for n in self.profile_fields if self.dataset.users.get(user, {}).get(n)]
            fields = rng.sample(fields, min(len(fields), rng.randint(1, self.max_conditions)))
            conditions, count = [], len(fields)
            wishes = [", ".join(f"{n.replace('_', ' ')} {self.dataset.users[user][n]}" for n in fields)] if fields else []
        elif kind == "interest":
            conditions, wishes = self._common_interest(rng, past, facts)
            count = len(conditions)
        else:
            count = rng.randint(1, self.max_conditions)
            conditions = rng.sample(facts, min(count, len(facts)))
            count = len(conditions)
            wishes = [WORDING.get(name, ("", f"with {name.replace('_', ' ')} {{}}"))[1].format(value) for name, value in conditions]
            for n, (name, value) in enumerate(conditions if kind == "implicit" else conditions[:1] if kind == "misinformed" else ()):
                named = self._witnesses(rng, (name, value), positive, touched)
                if named is None:
                    return None
                touched |= {x.id for x in named}  # what the request names is not what it asks for
                noun = WORDING.get(name, (name.replace("_", " "),))[0]
                wishes[n] = f"with the same {noun} as " + " and ".join(x.title for x in named)
                if kind == "misinformed":
                    false = [v for v in self.values[name] if all(v not in x.attributes.get(name, ()) for x in (*named, positive))]
                    if not false:
                        return None
                    wrong = (name, rng.choice(false))
                    wishes[n] += f" ({noun} {wrong[1]}, if I remember rightly)"
        candidates = self._candidates(rng, positive, conditions, wrong, touched) if wishes else None
        if candidates is None:
            return None
        wish = ", ".join(wishes[:-1]) + " and " * (len(wishes) > 1) + wishes[-1]
        text = rng.choice(TEMPLATES[f"{kind} test" if split == "test" else kind]).format(wish)
        return Query(f"{split}/{user}/{position}/{kind}/{number}", text, kind, count, candidates, (positive.id,), user, past,
                     tuple(conditions))

    def _common_interest(self, rng, past, facts):
        pairs = [(a, b) for n, a in enumerate(past) for b in past[:n] if self.keys[a.id] != self.keys[b.id]]
        for a, b in rng.sample(pairs, len(pairs)):
            common = [f for f in self.facts[a.id] if f in self.facts[b.id]]
            if 0 < len(common) <= self.max_conditions and all(f in facts for f in common):
                return common, [f"{a.title} and {b.title}"]
        return [], []

    def _witnesses(self, rng, fact, positive, touched):
        """Items that identify a value: one that has no other of that attribute, or two whose only common one it is; or None."""
        name, value = fact
        known = [self.dataset.items[i] for i in self.with_fact[fact] if i not in touched and self.keys[i] != self.keys[positive.id]]
        known = rng.sample(known, min(8, len(known)))
        for n, a in enumerate(known):
            if len(a.attributes[name]) == 1:
                return [a]
            for b in known[:n]:
                if self.keys[a.id] != self.keys[b.id] and set(a.attributes[name]) & set(b.attributes[name]) == {value}:
                    return [b, a]
        return None

    def _candidates(self, rng, positive, conditions, wrong, touched):
        """The positive and negatives in random order, no two of one title; None where the catalogue has too few."""
        items = self.dataset.items

        def meets(i):
            return conditions and all(f in self.facts[i] for f in conditions)

        def proposals():
            if wrong:
                yield rng.choice(self.with_fact[wrong])
            near = round(self.near_misses * (self.num_candidates - 1)) if len(conditions) > 1 else 0
            for _ in range(near):  # meets one condition, so of two conditions all but one
                yield rng.choice(self.with_fact[rng.choice(conditions)])
            for _ in range(50 * self.num_candidates):
                yield rng.choice(self.dataset.item_ids)

        chosen, titles = [positive], {self.keys[positive.id]}
        for i in proposals():
            if len(chosen) < self.num_candidates and i not in touched and self.keys[i] not in titles and not meets(i):
                titles.add(self.keys[i])
                chosen.append(items[i])
        rng.shuffle(chosen)
        return chosen if len(chosen) == self.num_candidates else None


# --- titles -----------------------------------------------------------------------------------------------------------

ARTICLE = re.compile(r"(.+?), (the|an?|l[ae]s?|l'?|los?|el|il|das|der|die|une?)(?= \(|$)")
YEAR = re.compile(r" ?[(\[](\d{4})[)\]][\W_]*$")
SAME = str.maketrans("‘’ʼ`“”„–—_", "''''\"\"\"-- ")  # one spelling for each; `_` stands for a space in RecBench+'s clues


def title_key(title):
    """(name, year or ""): equal for two spellings of one title. ("", …) when nothing is left, which must never match.

    Compatibility forms (NFKC), case and white space are folded; quotes and brackets around the title and full stops after it are
    dropped; a trailing article goes to the front. `"Godfather, The" (1972)` is ("the godfather", "1972").
    """
    name = " ".join(unicodedata.normalize("NFKC", title.translate(SAME)).casefold().split())
    year = YEAR.search(name)
    name = (name[:year.start()] if year else name).strip(" \"'*«»[]{}<>.,;:")
    if name[:1] == "(" and (name[-1] == ")" or ")" not in name):
        name = name.strip("()")
    if moved := ARTICLE.match(name):
        article = "l'" if moved[2][:1] == "l" and len(moved[2].rstrip("'")) == 1 else moved[2] + " "
        name = article + moved[1] + name[moved.end():]
    return name, year[1] if year else ""


# --- RecBench+ --------------------------------------------------------------------------------------------------------

RECBENCH_FILES = {"explicit": "ExplicitQuery.json", "implicit": "ImplicitQuery.json", "misinformed": "MisinformedQuery.json",
                  "interest": "InterestBasedQuery.json", "demographics": "DemographicsBasedQuery.json"}
WHERE = "RecBench+ (arXiv 2503.09382) publishes its dataset folder at https://github.com/jiani-huang/RecBench"


@dataclass
class RecBench:
    """One domain of the benchmark.

    items: the catalogue. Attributes are those of the catalogue file (a movie's genres), which *every* item has: safe to show.
    facts: item id -> relation -> values, from the conditions and clues of the queries. They are there for right items and hardly
    for others, so a prompt that showed them would give the answer away: for the item-attribute graph alone, `graph_items`.
    touched: user -> ids of everything the user rated, where ratings.dat is there; never drawn as a negative.
    left_out: query id -> why; a query none of whose right titles is in the catalogue.
    """

    items: dict[str, Item]
    queries: list[Query]
    facts: dict[str, dict[str, tuple[str, ...]]]
    touched: dict[str, set[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def graph_items(self):
        """The catalogue with the facts among the attributes: for the item-attribute graph, never for a prompt."""
        merged = {}
        for i, item in self.items.items():
            attributes = dict(item.attributes)
            for relation, values in self.facts.get(i, {}).items():
                attributes[relation] = tuple(dict.fromkeys(attributes.get(relation, ()) + values))
            merged[i] = replace(item, attributes=attributes)
        return merged

    def holders(self):
        """(relation, value) -> ids of the items known to have it."""
        held = defaultdict(set)
        for i, item in self.graph_items().items():
            for relation, values in item.attributes.items():
                for value in values:
                    held[relation, value].add(i)
        return held


def load_recbench(folder, domain="movie", history_length=10):
    """Read dataset/{domain}/ of a RecBench+ copy, with those of its query files that are there.

    movie: movies.dat (`id::title (year)::genre|genre`) is the catalogue, ids are its ids; ratings.dat (`user::id::rating::time`)
    beside it is optional and gives histories, without the right items and all others known to meet the conditions.
    book: books.dat (`id::title`) where it is there; else every book that a record names, its title as id.
    Raises InputError for what is missing or malformed.
    """
    if domain not in ("movie", "book"):
        raise InputError(f"RecBench+ has the domains movie and book, not {domain!r}")
    base = Path(folder).expanduser()
    base = next((b for b in (base / "dataset" / domain, base / domain) if b.is_dir()), None)
    if base is None:
        raise InputError(f"{folder}: no folder dataset/{domain} there. {WHERE}")
    found = [k for k, name in RECBENCH_FILES.items() if (base / name).is_file()]
    if not found:
        raise InputError(f"{base}: no query file there (such as {RECBENCH_FILES['explicit']}). {WHERE}")
    catalogue = base / f"{domain}s.dat"
    grows = not catalogue.is_file()
    if domain == "movie" and grows:
        raise InputError(f"{base}: movies.dat is missing: the catalogue, MovieLens 1M's file of that name. {WHERE}")
    items, index = ({}, {}) if grows else _read_catalogue(catalogue)

    def resolve(title, item_id=None):
        """The id of a title, or None. An id that the catalogue has goes before the title, which may be misencoded."""
        if item_id is not None and str(item_id) in items:
            return str(item_id)
        key = title_key(title)
        known = index.get(key) or index.get(title_key(_ascii(title)))
        if known is None and grows and key[0]:
            known = index[key] = clean(title)
            items.setdefault(known, Item(known, known))
        return known

    records = {}  # query id -> fields, in file order
    facts = defaultdict(lambda: defaultdict(dict))  # the innermost dict is an ordered set
    for kind in found:
        read = _condition_record if kind in ("explicit", "implicit", "misinformed") else _profile_record
        for number, record in enumerate(_read_json_list(base / RECBENCH_FILES[kind])):
            where = f"{base / RECBENCH_FILES[kind]} record {number}"
            if not isinstance(record, dict):
                raise InputError(f"{where}: expected an object, found {str(record)[:60]!r}")
            for suffix, fields in read(record, where, domain, kind):
                name = f"{domain}-{kind}-{record.get('data_idx', number)}{suffix}"
                while name in records:
                    name += "+"
                truths = [resolve(t, i) for t, i in zip(fields["titles"], fields.pop("ids"))]
                fields["truths"] = tuple(dict.fromkeys(t for t in truths if t))
                clues = [(resolve(t), relation, value) for t, relation, value in fields.pop("clues")]
                for i, relation, value in [(t, *c) for t in fields["truths"] for c in fields["conditions"]] + clues:
                    if i and value:
                        facts[i][relation][value] = None
                records[name] = fields | {"kind": kind}
    facts = {i: {relation: tuple(values) for relation, values in f.items()} for i, f in facts.items()}
    bench = RecBench(items, [], facts)
    ratings = _read_ratings(base / "ratings.dat", items)
    bench.touched = {user: set(rated) for user, rated in ratings.items()}
    held = bench.holders() if ratings else {}
    for name, fields in records.items():
        past = [resolve(t) for t in fields.pop("past")]
        if not past and fields["user"] in ratings:
            avoid = set(fields["truths"]).union(_meeting(held, fields["conditions"]))
            past = [i for i in ratings[fields["user"]] if i not in avoid]
        history = [items[i] for i in past if i and i not in fields["truths"]][-history_length:]
        if fields["truths"]:
            bench.queries.append(Query(id=name, candidates=[], history=history, **fields))
        else:
            bench.left_out[name] = f"not in the catalogue: {', '.join(fields['titles'])[:200]}"
    return bench


def recbench_queries(bench, queries=None, num_candidates=20, seed=0):
    """The queries (None: all) with candidates: one right item and negatives, shuffled. A list follows from (seed, query id).

    Negatives are uniform over the catalogue, without the right items, the history, what the user rated, and the items that are
    known to meet all conditions [C]: those are right answers too, only not this user's. No two candidates have the same title.
    """
    if num_candidates < 2:
        raise InputError(f"a list needs at least 2 candidates, not {num_candidates}")
    ids, held, lists = list(bench.items), bench.holders(), []
    for query in bench.queries if queries is None else queries:
        rng = random.Random(f"{seed}/{query.id}")
        excluded = {*query.truths, *(h.id for h in query.history), *bench.touched.get(query.user, ()),
                    *_meeting(held, query.conditions)}
        taken = {title_key(bench.items[t].title) for t in query.truths}
        positive = rng.choice(query.truths)
        for size in (len(excluded) + 2 * num_candidates, len(ids)):  # the second only when many titles are equal
            drawn = [i for i in rng.sample(ids, min(size, len(ids))) if i not in excluded]
            unequal = {key: i for i in drawn if (key := title_key(bench.items[i].title)) not in taken}
            negatives = list(unequal.values())[:num_candidates - 1]
            if len(negatives) == num_candidates - 1:
                break
        else:
            raise InputError(f"query {query.id}: {num_candidates} candidates need {num_candidates - 1} wrong items, but only "
                             f"{len(negatives)} of the catalogue's {len(ids)} are left; lower the number of candidates")
        chosen = [positive, *negatives]
        rng.shuffle(chosen)
        lists.append(replace(query, candidates=[bench.items[i] for i in chosen], truths=(positive,)))
    return lists


def split_queries(queries, seed=0, train=0.8, validation=0.1):
    """{"train", "validation", "test"} -> queries, in their order. A query's split follows from the seed and its user alone, so it
    stays when files grow. By user, not by query id [C]: a misinformed record repeats the user and the answer of an explicit one,
    which would then stand in training and test at once. Queries without a user (interest, demographics) go by their id."""
    splits = {"train": [], "validation": [], "test": []}
    for query in queries:
        u = random.Random(f"{seed}/split/{query.user or query.id}").random()
        splits["train" if u < train else "validation" if u < train + validation else "test"].append(query)
    return splits


def _meeting(held, conditions):
    """Ids of the items known to meet all conditions; none where there are no conditions."""
    return set.intersection(*(held.get(c, set()) for c in conditions)) if conditions else set()


def _ascii(title):
    """The title without its non-ASCII characters: all that a title shares with its own misencoded form."""
    return "".join(c for c in title if c.isascii())


def _one_line(text):
    return " ".join(filter(None, map(clean, text.split())))  # by words: `clean` cuts at MAX_TEXT, which is for titles


def _read_dat(path, num_fields):
    """(line number, fields) of a `::` file: UTF-8, or Latin-1 as MovieLens publishes it."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            fields = line.rstrip("\r").split("::")
            if len(fields) < num_fields or not fields[0].strip():
                raise InputError(f"{path} line {number}: expected {num_fields} or more fields between `::`, found {line[:60]!r}")
            yield number, [f.strip() for f in fields]


def _read_catalogue(path):
    """id -> Item, and title key -> id. Characters lost upstream (U+FFFD) are dropped: no model could copy them into an answer."""
    items, index = {}, {}
    for _, (item_id, title, *genres) in _read_dat(path, 2):
        values = tuple(filter(None, map(clean, genres[0].split("|")))) if genres else ()
        title_shown = clean(title.replace("\ufffd", "")) or f"untitled {item_id}"
        items[item_id] = Item(item_id, title_shown, {"genre": values} if values else {})
        for key in {title_key(title), title_key(_ascii(title))} if "\ufffd" in title else {title_key(title)}:
            if key[0]:
                index.setdefault(key, item_id)
    if not items:
        raise InputError(f"{path}: the catalogue is empty")
    return items, index


def _read_ratings(path, items):
    """user -> item ids, oldest first; {} where there is no such file."""
    ratings = defaultdict(list)
    for number, fields in _read_dat(path, 4) if path.is_file() else ():
        if fields[1] not in items or not fields[3].isdigit():
            raise InputError(f"{path} line {number}: expected user::item::rating::time with an item of the catalogue")
        ratings[fields[0]].append((int(fields[3]), fields[1]))
    return {user: [i for _, i in sorted(rated, key=lambda r: r[0])] for user, rated in ratings.items()}


def _read_json_list(path):
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a decoding error is a ValueError too
        raise InputError(f"{path}: not valid JSON ({error}); is the download complete?") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of records, found {type(records).__name__}")
    return records


def _texts(record, name, where):
    """A field that must be a non-empty list of non-empty texts."""
    value = record.get(name)
    if not (isinstance(value, list) and value and all(isinstance(t, str) and t.strip() for t in value)):
        raise InputError(f"{where}: `{name}` must be a list of titles, found {str(value)[:60]!r}")
    return tuple(value)


def _text(record, names, where):
    """The first of the fields that is there, which must be a text."""
    value = next((record[n] for n in names if record.get(n)), None)
    if not isinstance(value, str) or not _one_line(value):
        raise InputError(f"{where}: `{names[0]}` must be the query's text, found {str(value)[:60]!r}")
    return _one_line(value)


def _condition_record(record, where, domain, kind):
    """[("", fields)] of an explicit, implicit or misinformed record."""
    titles = _texts(record, f"{domain}Subset", where)
    ids = record.get(f"{domain}SubsetId", [None] * len(titles))  # books have none
    if not isinstance(ids, list) or len(ids) != len(titles):
        raise InputError(f"{where}: `{domain}SubsetId` must hold one id for each title of `{domain}Subset`")
    shared = record.get("sharedRelationships")
    if not (isinstance(shared, list) and shared and all(isinstance(c, list) and len(c) == 2 for c in shared)):
        raise InputError(f"{where}: `sharedRelationships` must be a list of [relation, value], found {str(shared)[:60]!r}")
    if not isinstance(record.get("condition_num"), int):
        raise InputError(f"{where}: `condition_num` must be a number, found {str(record.get('condition_num'))[:60]!r}")
    conditions = tuple((str(relation).lower(), clean(str(value))) for relation, value in shared)
    clues = []
    for clue in [*(record.get("multihop_info") or []), *(record.get("misinformed") or [])]:
        value = clue.get("original person", clue.get("person")) if isinstance(clue, dict) else None  # never the wrong one
        if value and isinstance(title := clue.get(domain), str) and clue.get("relation"):
            clues.append((title, str(clue["relation"]).lower(), clean(str(value))))
    names = ("query",) if kind == "misinformed" else ("situational_description_query", "direct_description_query")
    text = _text(record, names, where)
    return [("", {"text": text, "num_conditions": record["condition_num"], "user": str(record.get("source_user", "")),
                  "titles": titles, "ids": ids, "conditions": conditions, "clues": clues,
                  "past": _titles(record.get("history_sample"))})]


def _profile_record(record, where, domain, kind):
    """[("-0", fields), …], one for each query of an interest or demographics record; numbered as the benchmark's evaluation does,
    which passes over empty ones."""
    children = record.get("query & ground true")
    if not isinstance(children, list) or not all(isinstance(c, dict) for c in children):
        raise InputError(f"{where}: `query & ground true` must be a list of objects, found {str(children)[:60]!r}")
    past = _titles(record.get(f"Shared consecutive {domain}s"))
    queries = []
    for n, child in enumerate(filter(None, children)):
        titles = _texts(child, f"{domain} subset", f"{where} query {n}")
        queries.append((f"-{n}", {"text": _text(child, ("query",), f"{where} query {n}"), "num_conditions": 0, "user": "",
                                  "titles": titles, "ids": [None] * len(titles), "conditions": (), "clues": [], "past": past}))
    return queries


def _titles(value):
    return [t for t in value if isinstance(t, str)] if isinstance(value, list) else []


class RecBenchQueries:
    """The benchmark's queries as a source of them, like QueryBuilder: users apart in training, validation and test."""

    def __init__(self, bench, kinds=None, num_candidates=20, seed=0):
        self.bench, self.num_candidates, self.seed = bench, num_candidates, seed
        there = {q.kind for q in bench.queries}
        self.kinds = tuple(k for k in (kinds or KINDS) if k in there)
        if missing := [k for k in kinds or () if k not in there]:
            raise InputError(f"no {', '.join(missing)} queries in these files; there are {', '.join(k for k in KINDS if k in there)}")
        self.splits = split_queries([q for q in bench.queries if q.kind in self.kinds], seed)

    def graph_items(self):
        return self.bench.graph_items().values()

    def draw(self, split, count, start=0):
        """At most `count` queries, each once. start > 0: as many as asked for, with other negatives, the queries coming round again."""
        pool = self.splits[split]
        if not pool:
            raise InputError(f"the {split} split of these RecBench+ files is empty ({len(self.bench.queries)} queries in all): it takes more records")
        order = random.Random(f"{self.seed}/{split}/{start}").sample(pool, len(pool))
        chosen = list(itertools.islice(itertools.cycle(order), count)) if start else order[:count]
        return recbench_queries(self.bench, chosen, self.num_candidates, f"{self.seed}/{start}" if start else self.seed)


def query_source(dataset, kinds=None, max_conditions=3, num_candidates=20, history_length=10, seed=0):
    """Where the queries of a data set come from: RecBench+'s own, or built from its attributes. Raises InputError."""
    if dataset.bench:
        return RecBenchQueries(dataset.bench, kinds, num_candidates, seed)
    return QueryBuilder(dataset, kinds, max_conditions, num_candidates, history_length, seed=seed)
