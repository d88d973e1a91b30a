"""Data: items, interactions, splits, candidate lists, and where they come from.

A list to be ranked (`Example`) is one interaction of a user (the *target*), those just before it (the
*history*) and K candidates: the target and K - 1 negatives that the user never touched.

Sources and their splits: the users of "toy" and of "recbench:movie" or book (arXiv 2503.09382) have a split
each; Amazon 2014 ("beauty", …) and RecBole folders of yours are leave-one-out (a user's last interaction is
test, the last but one validation); "amazon2023:Video_Games", or another category, is temporal (80/10/10 of
all targets by time; those of one time fall on one side of a border).

Choices of ours:
  1. Negatives exclude everything the user *ever* touched, also after the target. So no negative is a hidden
     positive, and no validation or test interaction can stand in a training prompt, not even as a negative.
  2. Everything random follows from (seed, user, position): a list is the same whichever others are drawn.
  3. A target that the user had before is left out of its history, where it could just be copied from.
"""

import gzip
import hashlib
import html
import json
import math
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

MAX_TEXT = 300  # characters kept of a title or of one attribute value
DEFAULT_CACHE = "~/.cache/r2rank"
SPLITS = ("train", "validation", "test")
NEGATIVES = ("uniform", "popularity", "category")
CATEGORY_FIELDS = ("categories", "category", "genre", "genres", "class", "kind")

class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""

@dataclass(frozen=True)
class Item:
    """One catalogue entry. Two items are equal when their ids are.

    attributes: name -> values, the most general first (a category path, for instance).
    """
    id: str
    title: str = field(compare=False)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    ago: str = field(default="", compare=False)  # in a history: how long before the target ("3 days ago")
    rating: float | None = field(default=None, compare=False)  # in a history: what the user gave

class Interaction(NamedTuple):  # a tuple, because there are millions
    item_id: str
    timestamp: float = 0.0  # seconds; only the order matters where the data has no clock
    rating: float | None = None

@dataclass(frozen=True)
class Example:
    """One list to rank: `history` oldest first, K `candidates`, and the `relevance` (K,) >= 0 of each."""
    user: str
    history: list[Item]
    candidates: list[Item]
    relevance: list[float]

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
    conditions: tuple[tuple[str, str], ...] = ()  # (attribute, value) pairs of a right item, where known
    titles: tuple[str, ...] = ()  # RecBench+: all right titles as the benchmark writes them

@dataclass
class Dataset:
    """A catalogue, the users' sequences, and which position of which user belongs to which split.

    splits: "train", "validation", "test" -> [(user, position of the target in the user's sequence)].
    train_length: user -> how many of the user's first interactions may be counted, shown or learnt from.
    negatives: "uniform" over the catalogue; "popularity", in proportion to training counts; "category", from
    the positive's category, the most special level first, then from the levels above it.
    bench: the RecBench+ files, where the data set is one of its domains.
    """
    name: str
    items: dict[str, Item]
    sequences: dict[str, list[Interaction]] = field(default_factory=dict)
    splits: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    train_length: dict[str, int] = field(default_factory=dict)
    has_clock: bool = False
    negatives: str = "uniform"
    bench: object = None
    item_ids: list[str] = field(init=False)

    def __post_init__(self):
        self.item_ids = list(self.items)
        if self.negatives == "popularity":
            self._interactions = list(self.popularity().elements())
        elif self.negatives == "category":
            self._by_category = defaultdict(list)
            for item in self.items.values():
                for value in _categories(item):
                    self._by_category[value].append(item.id)
            if not self._by_category:
                raise InputError(f"--negatives category: no item has one of {', '.join(CATEGORY_FIELDS)}")

    def targets(self, split, seed=0):
        """The (user, position) pairs of a split, in an order that follows from the seed."""
        if not self.splits[split]:
            raise InputError(f"{self.name}: the {split} split is empty: too few interactions or times")
        return random.Random(f"{seed}/{split}").sample(self.splits[split], len(self.splits[split]))

    def example(self, target, num_candidates=20, history_length=10, seed=0):
        """Build the list of one target. Raises InputError when the catalogue is too small for the user."""
        user, position = target
        rng = random.Random(f"{seed}/{user}/{position}")
        positive = self.sequences[user][position].item_id
        touched = {x.item_id for x in self.sequences[user]}
        if len(self.items) - len(touched) < num_candidates - 1:
            raise InputError(f"{self.name}: user {user} leaves too few items; lower --num-candidates")
        ids = [positive]
        proposals = self._proposals(rng, positive, num_candidates + len(touched))
        while len(ids) < num_candidates:
            drawn = next(proposals)
            if drawn not in touched:
                touched.add(drawn)
                ids.append(drawn)
        rng.shuffle(ids)
        history = self.history(user, position, history_length)
        return Example(user, history, [self.items[i] for i in ids], [float(i == positive) for i in ids])

    def history(self, user, position, length=10):
        """The latest `length` items before a position, as prompts show them; see choice 3.

        The position after the last: nothing is left out, and ages are those at the last interaction."""
        sequence = self.sequences[user]
        target = sequence[min(position, len(sequence) - 1)]
        past = [x for x in sequence[:position] if x.item_id != target.item_id or position == len(sequence)]
        return [replace(self.items[x.item_id], rating=x.rating, ago=self._ago(x, target))
                for x in past[max(0, len(past) - length):]]

    def _proposals(self, rng, positive, enough):
        """An endless stream of ids to draw negatives from; the caller passes over what it cannot use."""
        if self.negatives == "popularity" and self._interactions:
            for _ in range(100 * enough):  # then uniformly: the user may have touched all that is popular
                yield rng.choice(self._interactions)
        elif self.negatives == "category":
            for value in reversed(_categories(self.items[positive])):
                pool = self._by_category[value]
                yield from rng.sample(pool, min(enough, len(pool)))
        while True:
            yield rng.choice(self.item_ids)

    def examples(self, split, num_lists=None, num_candidates=20, history_length=10, seed=0):
        """The first `num_lists` (None: all) lists of a split, in seeded order."""
        chosen = self.targets(split, seed)[:num_lists]
        return [self.example(target, num_candidates, history_length, seed) for target in chosen]

    def training(self):
        """User -> item ids of the training period, oldest first: all that a baseline may learn from."""
        lengths = self.train_length
        return {u: [x.item_id for x in s[:lengths[u]]] for u, s in self.sequences.items() if lengths[u]}

    def popularity(self):
        """Item id -> number of interactions in the training period."""
        return Counter(i for ids in self.training().values() for i in ids)

    def texts(self):
        """All the text of the catalogue, an item a line: what a tokenizer may be trained on."""
        return [describe(item) for item in self.items.values()]

    def _ago(self, past, target):
        days = (target.timestamp - past.timestamp) / 86400
        for unit, length in (("year", 365), ("month", 30), ("week", 7), ("day", 1)):
            if self.has_clock and days >= length:
                n = int(days / length)
                return f"{n} {unit}{'s' * (n > 1)} ago"
        return "today" if self.has_clock else ""

def _categories(item):
    return next((item.attributes[name] for name in CATEGORY_FIELDS if name in item.attributes), ())

# What pandas and databases write for "nothing there".
MISSING = {"", *"nan NaN NAN -nan -NaN NaT None none NULL Null null <NA> N/A n/a NA #N/A #NA".split()}

def describe(item):
    """One line: `{ago}: {title} (brand / category, rated r)`, without what the title already says."""
    title = item.title.lower()
    shown = [v[-2:] for v in item.attributes.values() if v and v[-1].lower() not in title]
    extra = " / ".join(map(", ".join, shown))
    rated = "" if item.rating is None else f"rated {item.rating:g}"
    notes = ", ".join(filter(None, (extra, rated)))
    return (f"{item.ago}: " if item.ago else "") + item.title + (f" ({notes})" if notes else "")

def clean(text):
    """One line of printable text: HTML entities resolved, control, format and bidirectional characters
    dropped, white space folded, cut at MAX_TEXT characters. Empty for what is MISSING or no string."""
    text = text[:20 * MAX_TEXT] if isinstance(text, str) else ""
    for _ in range(8):  # `&amp;amp;quot;` was escaped three times; the bound is against hostile text
        text = html.unescape(text)
    if not (text.isascii() and text.isprintable()):
        kept = (c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
        text = "".join(" " if c.isspace() else c for c in kept)
    text = re.sub(r" +", " ", text).strip()
    if text in MISSING:
        return ""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT - 1].rstrip() + "…"

def make_item(item_id, title, attributes):
    """An Item of cleaned text. A missing title is replaced by what is known."""
    attributes = {name: tuple(filter(None, map(clean, values))) for name, values in attributes.items()}
    attributes = {name: values for name, values in attributes.items() if values}
    known = " ".join(["untitled", *(values[-1] for values in attributes.values())])
    return Item(item_id, clean(title) or clean(known), attributes)

def attribute_pairs(item):
    """The (attribute, value) pairs of an item, in order, each once."""
    return list(dict.fromkeys((name, value) for name, values in item.attributes.items() for value in values))

ARTICLE = re.compile(r"(.+?), (the|an?|l[ae]s?|l'?|los?|el|il|das|der|die|une?)(?= \(|$)")
YEAR = re.compile(r" ?[(\[](\d{4})[)\]][\W_]*$")
SAME = str.maketrans("‘’ʼ`“”„–—_", "''''\"\"\"-- ")  # `_` is a space in RecBench+'s clues

def title_key(title):
    """(name, year or ""): equal for two spellings of one title. ("", _) when nothing is left: never a match.

    Compatibility forms (NFKC), case and white space are folded; quotes and brackets around the title and full
    stops after it are dropped; an article goes to the front: `"Heat, The" (1972)` is ("the heat", "1972").
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

def load(name, split=None, seed=0, negatives="uniform", cache_dir=None, core=0, data_dir=None,
         history_length=10):
    """The Dataset of a name or folder. split: "temporal", "leave-one-out" or None for the source's default.

    core: keep only users and items with that many interactions, again and again. cache_dir holds downloads,
    data_dir RecBench+'s files, whose queries come with history_length items. Raises InputError.
    """
    from extras import recbole, sources

    folder = Path(name).expanduser()
    users_apart = name == "toy" or name.startswith("recbench:")
    public = name in sources.AMAZON_2014 or name.startswith("amazon2023:")
    if folder.is_dir() and (users_apart or public):
        print(f"note: --data {name} is the set of that name; for the folder give ./{name}", file=sys.stderr)
    if users_apart and (split or core):
        raise InputError(f"--split and --core do not apply to {name}, whose users each have a split")
    if name == "toy":
        from extras.toy import shop
        return replace(shop(seed), negatives=negatives)
    if users_apart and (not data_dir or negatives != "uniform"):
        raise InputError(f"--data {name}: give --data-dir, the folder of github.com/jiani-huang/RecBench, "
                         f"and no --negatives")
    if users_apart:
        from extras.recbench import RecBench
        bench = RecBench(data_dir, name.partition(":")[2], history_length)
        return Dataset(name.replace(":", "-"), bench.items, bench=bench)
    if public:
        dataset, default = sources.read(name, Path(cache_dir or DEFAULT_CACHE).expanduser())
    elif folder.is_dir():
        dataset, default = recbole.read_folder(folder), "leave-one-out"
    else:
        raise InputError(f"--data {name}: no such folder. Give toy, {', '.join(sources.AMAZON_2014)}, "
                         f"amazon2023:CATEGORY, recbench:movie, recbench:book, or a folder with NAME.inter")
    if dataset.train_length:  # .train, .valid and .test files
        if split or core:
            raise InputError(f"{dataset.name}: the files are split already; leave out --split and --core")
        return replace(dataset, negatives=negatives)
    temporal = (split or default) == "temporal"
    if temporal and not dataset.has_clock:
        raise InputError(f"{dataset.name}: --split temporal needs timestamps; here they are missing or only "
                         f"positions. Use --split leave-one-out")
    dataset = recbole.k_core(dataset, core) if core else dataset
    splits, train_length = (split_temporal if temporal else split_leave_one_out)(dataset.sequences)
    return replace(dataset, splits=splits, train_length=train_length, negatives=negatives)

def split_leave_one_out(sequences):
    """(splits, train_length), see Dataset. Users with fewer than 3 interactions are for training only."""
    splits, train_length = {split: [] for split in SPLITS}, {}
    for user, sequence in sequences.items():
        n = train_length[user] = len(sequence) - (2 if len(sequence) >= 3 else 0)
        splits["train"] += [(user, p) for p in range(1, n)]
        if n < len(sequence):
            splits["validation"].append((user, n))
            splits["test"].append((user, n + 1))
    return splits, train_length

def split_temporal(sequences, train=0.8, validation=0.1):
    """(splits, train_length), see Dataset. Examples of the same time are on the same side of a border."""
    splits = {split: [] for split in SPLITS}
    times = sorted(x.timestamp for s in sequences.values() for x in s[1:]) or [math.inf]
    first, second = (times[min(int(len(times) * f), len(times) - 1)] for f in (train, train + validation))
    for user, sequence in sequences.items():
        for p, x in enumerate(sequence[1:], start=1):
            split = "train" if x.timestamp < first else "validation" if x.timestamp < second else "test"
            splits[split].append((user, p))
    return splits, {u: sum(x.timestamp < first for x in s) for u, s in sequences.items()}

def read_lines(path):
    """(number, text) of each line that is not empty; path may be gzipped. Raises InputError."""
    try:
        # Bytes, because only \n ends a line: titles hold what text would be split at (U+2028, U+0085).
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode()
                except UnicodeDecodeError:  # of this line; the next may be UTF-8
                    text = line.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
                if (text := text.strip("\r\n\ufeff")).strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); if it is a cut download, delete it") from None

def save_lists(path, examples):
    """JSONL, a list a line: user, history (item ids, with ago and ratings), candidates (ids), relevance."""
    with open(path, "w", encoding="utf-8") as f:
        for e in examples:
            record = {"user": e.user, "history": [x.id for x in e.history],
                      "ago": [x.ago for x in e.history], "ratings": [x.rating for x in e.history],
                      "candidates": [x.id for x in e.candidates], "relevance": e.relevance}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")

def read_lists(path, items, count_misses=False):
    """The examples of a JSONL that save_lists, or another program, wrote. Raises InputError with the line.

    count_misses: keep lists without a relevant item, which a retriever's candidates may be (relevance all 0).
    """
    examples = []
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
            ids, past = record["candidates"], record.get("history", [])
            relevance = [float(y) for y in record["relevance"]]
            ago, ratings = record.get("ago", [""] * len(past)), record.get("ratings", [None] * len(past))
            history = [replace(items[i], ago=clean(a), rating=None if r is None else float(r))
                       for i, a, r in zip(past, ago, ratings, strict=True)]
            distinct = 2 <= len(ids) == len(set(ids)) == len(set(ids) - set(past)) == len(relevance)
            graded = all(0 <= y < 100 for y in relevance) and (any(relevance) or count_misses)
            if not (distinct and graded):
                raise ValueError("give 2 or more different candidates, none of them in the history, and a "
                                 "relevance of 0 to 100 for each, not all 0")
            user = str(record.get("user") or f"line {number}")
            examples.append(Example(user, history, [items[i] for i in ids], relevance))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(f'{path} line {number}: expected {{"user", "history": [ids of the catalogue], '
                             f'"candidates": [ids], "relevance": [numbers]}}; {error!r}') from None
    if not examples:
        raise InputError(f"{path}: no lists in it")
    return examples

def fingerprint(lists):
    """16 hex digits, equal for results about the very same lists (Examples or Queries)."""
    ids = [(x.user, [h.id for h in x.history], [c.id for c in x.candidates],
            list(x.truths if isinstance(x, Query) else x.relevance)) for x in lists]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
