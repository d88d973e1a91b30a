"""Data: items, interactions, splits and candidate lists.

A data set is a catalogue of `Item`s and, for each user, a time-ordered sequence of interactions. A list to be ranked
(`Example`) is one interaction to predict (the *target*), the interactions just before it (the *history*) and
K candidates: the target and K - 1 negatives drawn uniformly from the items the user never touched.

    load("toy", seed=0)              a seeded synthetic beauty shop; nothing to download
    load("path/to/NAME")             a folder with RecBole atomic files: NAME.inter, NAME.item [, NAME.kg, NAME.link]

Splits (METHODS "Protocol"):
  temporal       global, 80/10/10 of the (history, target) examples; the borders are points in time, so that no training
                 example is as late as a validation example (examples that tie with a border all fall after it)
  leave-one-out  last interaction of a user = test, last but one = validation; for sets without usable timestamps
  users apart    the toy: training, validation and test users are different people

Choices of ours:
  1. Negatives exclude everything the user *ever* touched, also after the target. So no negative is a hidden positive, and no
     validation or test interaction can stand in a training prompt, not even as a negative.
  2. Everything random follows from (seed, user, position): a list is the same whichever other lists are drawn, and when.
"""

import csv
import html
import math
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

MAX_TEXT = 300  # characters kept of a title or of one attribute value


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""


@dataclass(frozen=True)
class Item:
    """One catalogue entry. Two items are equal when their ids are.

    attributes: name -> values, the most general first (a category path, for instance). `ago` and `rating` are only set on
    the items of a history: how long before the target ("3 days ago"), and what the user gave.
    """

    id: str
    title: str = field(compare=False)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    ago: str = field(default="", compare=False)
    rating: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Interaction:
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


@dataclass
class Dataset:
    """A catalogue, the users' sequences, and which position of which user belongs to which split.

    splits: "train", "validation", "test" -> [(user, position of the target in the user's sequence)].
    train_length: user -> how many of the user's first interactions lie in the training period; nothing beyond them may be
    counted, shown or learnt from in training.
    """

    name: str
    items: dict[str, Item]
    sequences: dict[str, list[Interaction]]
    splits: dict[str, list[tuple[str, int]]]
    train_length: dict[str, int]
    has_clock: bool = False
    item_ids: list[str] = field(init=False)

    def __post_init__(self):
        self.item_ids = list(self.items)

    def targets(self, split, seed=0):
        """The (user, position) pairs of a split, in an order that follows from the seed."""
        if not self.splits[split]:
            raise InputError(f"{self.name}: the {split} split is empty; it takes users with at least 3 interactions "
                             f"(this set has {len(self.sequences)} users)")
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
        negatives = []
        while len(negatives) < num_candidates - 1:  # rejection: the catalogue is much larger than the list
            drawn = rng.choice(self.item_ids)
            if drawn not in touched:
                touched.add(drawn)
                negatives.append(drawn)
        ids = [positive.item_id, *negatives]
        rng.shuffle(ids)
        past = sequence[max(0, position - history_length):position]
        history = [replace(self.items[x.item_id], rating=x.rating, ago=self._ago(x, positive)) for x in past]
        return Example(user, history, [self.items[i] for i in ids], [float(i == positive.item_id) for i in ids])

    def examples(self, split, num_lists=None, num_candidates=20, history_length=10, seed=0):
        """The first `num_lists` (None: all) lists of a split, in seeded order."""
        return [self.example(t, num_candidates, history_length, seed) for t in self.targets(split, seed)[:num_lists]]

    def popularity(self):
        """Item id -> number of interactions in the training period."""
        counts = Counter()
        for user, sequence in self.sequences.items():
            counts.update(x.item_id for x in sequence[:self.train_length[user]])
        return counts

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


def describe(item):
    """One line about an item: `{ago}: {title} (brand / category, rated r)`. Attributes already in the title are left out."""
    title = item.title.lower()
    extra = [", ".join(values[-2:]) for values in item.attributes.values() if values and values[-1].lower() not in title]
    notes = [" / ".join(extra)] if extra else []
    if item.rating is not None:
        notes.append(f"rated {item.rating:g}")
    return (f"{item.ago}: " if item.ago else "") + item.title + (f" ({', '.join(notes)})" if notes else "")


def clean(text):
    """One line of printable text: HTML entities resolved, control, format and bidirectional characters dropped, white space
    folded, cut at MAX_TEXT characters."""
    text = html.unescape(text)
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = re.sub(r" +", " ", text).strip()
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT - 1].rstrip() + "…"


def load(name, split=None, seed=0):
    """Load a data set by name or folder. split: "temporal", "leave-one-out" or None for the set's own default."""
    if name == "toy":
        if split:
            raise InputError("--split does not apply to the toy set: its training, validation and test users are different people")
        return toy(seed)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"--data {name}: no such folder. Give `toy`, or a folder with NAME.inter and NAME.item (RecBole atomic files)")
    return load_recbole(folder, split or "leave-one-out")


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


# --- RecBole atomic files --------------------------------------------------------------------------------------------


def read_atomic(path, required):
    """Rows of a tab-separated file with a typed header (`field:type`), as (line number, {field: text}); and the types."""
    with open(path, encoding="utf-8", errors="replace", newline="") as f:
        reader = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(reader, None) or []
        types = {}
        for cell in header:
            name, _, kind = cell.partition(":")
            if kind not in ("token", "token_seq", "float", "float_seq"):
                raise InputError(f"{path} line 1: expected `field:type` with type token, token_seq or float, found {cell[:40]!r}")
            types[name] = kind
        for name in required:
            if name not in types:
                raise InputError(f"{path}: no column `{name}`; it has {', '.join(types) or 'none'}")

        def rows():
            for number, row in enumerate(reader, start=2):
                if len(row) != len(header):
                    raise InputError(f"{path} line {number}: expected {len(header)} fields, found {len(row)}")
                yield number, dict(zip(types, row))

        return types, list(rows())


def load_recbole(folder, split):
    names = sorted(p.stem for p in folder.glob("*.inter"))
    if len(names) != 1:
        raise InputError(f"{folder}: expected one NAME.inter file, found {len(names)}")
    base = folder / names[0]
    if not base.with_suffix(".item").exists():
        raise InputError(f"{folder}: {base.name}.inter is there, but {base.name}.item (the catalogue: item_id, title, …) is missing")
    items = _read_items(base)
    sequences, has_clock = _read_interactions(base, items)
    if split == "temporal" and not has_clock:
        raise InputError(f"{folder}: --split temporal needs real timestamps; here they are missing or only count a user's "
                         f"interactions. Use --split leave-one-out")
    splits, train_length = (split_temporal if split == "temporal" else split_leave_one_out)(sequences)
    return Dataset(base.name, items, sequences, splits, train_length, has_clock)


def _read_items(base):
    types, rows = read_atomic(base.with_suffix(".item"), ["item_id"])
    title_field = next((n for n in types if n == "title"), None) or next((n for n in types if "title" in n or n == "name"), None)
    if title_field is None:
        raise InputError(f"{base.name}.item: no title column (`title`, `movie_title` or `name`); it has {', '.join(types)}")
    features = [n for n, kind in types.items() if n not in ("item_id", title_field) and kind.startswith("token")]
    knowledge = _read_knowledge(base)
    items = {}
    for _, row in rows:
        attributes = {}
        for name in features:
            if "|" in row[name]:
                values = row[name].split("|")
            else:
                values = row[name].split(" ") if types[name] == "token_seq" else [row[name]]
            if values := tuple(v for v in map(clean, values) if v):
                attributes[name] = values
        for relation, values in knowledge.get(row["item_id"], {}).items():
            if values not in attributes.values():  # the same genres under two names would only lengthen the prompt
                attributes[relation] = values
        title = clean(row[title_field]) or "untitled " + " ".join(v[-1] for v in attributes.values())
        items[row["item_id"]] = Item(row["item_id"], title.strip(), attributes)
    return items


def _read_knowledge(base):
    """NAME.kg + NAME.link, where both are there: item id -> {relation: the names it leads to}."""
    if not (base.with_suffix(".kg").exists() and base.with_suffix(".link").exists()):
        return {}
    _, links = read_atomic(base.with_suffix(".link"), ["item_id", "entity_id"])
    item_of = {row["entity_id"]: row["item_id"] for _, row in links}
    _, triples = read_atomic(base.with_suffix(".kg"), ["head_id", "relation_id", "tail_id"])
    knowledge = {}
    for _, row in triples:
        if row["head_id"] in item_of and (value := clean(row["tail_id"])):
            relations = knowledge.setdefault(item_of[row["head_id"]], {})
            relations[row["relation_id"]] = relations.get(row["relation_id"], ()) + (value,)
    return knowledge


def _read_interactions(base, items):
    path = base.with_suffix(".inter")
    types, rows = read_atomic(path, ["user_id", "item_id"])
    sequences = {}
    for number, row in rows:
        if row["item_id"] not in items:
            raise InputError(f"{path} line {number}: item {row['item_id']!r} is not in {base.name}.item")
        try:
            timestamp = float(row.get("timestamp") or 0)
            rating = float(row["rating"]) if row.get("rating") else None
        except ValueError:
            raise InputError(f"{path} line {number}: timestamp and rating must be numbers") from None
        sequences.setdefault(row["user_id"], []).append(Interaction(row["item_id"], timestamp, rating))
    for sequence in sequences.values():
        sequence.sort(key=lambda x: x.timestamp)  # stable: ties keep the file's order
    # Some published files carry a position (1, 2, …) instead of a time: good for order, not across users.
    has_clock = "timestamp" in types and any(x.timestamp > 1e6 for s in sequences.values() for x in s)
    if has_clock and max(s[-1].timestamp for s in sequences.values()) > 1e11:  # milliseconds
        sequences = {u: [replace(x, timestamp=x.timestamp / 1000) for x in s] for u, s in sequences.items()}
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
