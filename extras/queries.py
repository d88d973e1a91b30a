"""Requests built from a catalogue, for ReRec on data that come without any (ours, not RecBench+'s).

A request has candidates of which exactly one is right. The kinds are four of RecBench+'s (arXiv 2503.09382):
  explicit     the values of some attributes themselves
  implicit     each value by items that have it: one, or two whose only common value of that attribute it is
  misinformed  the first value by an item that has it, with a wrong value given for it; the others themselves
  interest     two items of the user's past; the right item has all that they have in common

Choices of ours:
  1. The right item is an interaction to predict of the split: nothing held out is a right answer in training.
  2. What the user touches at any time is neither a negative nor named: no negative is a hidden right answer.
  3. At least three items have the value of a condition, so that it does not name the item, and at most half.
  4. Some negatives meet one of several conditions; a misinformed request has one with the wrong value.
  5. A request follows from (seed, split, user, position, kind, number) alone. Test has other templates.
"""

import itertools
import random

from data import InputError, Query, attribute_pairs, title_key

# Attribute -> (what its value is called, how a value is asked for). Others go by the attribute's name.
WORDING = {"genre": ("genre", "of the genre"), "brand": ("brand", "from the brand"),
           "categories": ("category", "from the category")}

# The last four of each are for test alone. {}: where the conditions stand.
TEMPLATES = {
    "explicit": """I am looking for something {}. | Can you recommend something {}? | Please suggest an
        item {}. | What would you recommend {}? | I want something {}. | Find me an item {}. | Do you have
        something {}? | I would like to try something {}. | Could you find something {} for me? | I would
        like an item {}, please. | Please recommend me something {}. | Do you have an item {} to suggest?""",
    "implicit": """I am looking for something {}. | Can you find an item {}? | I want something new {}. |
        What do you have {}? | Please recommend something {}. | Is there an item {}? | I would love to try
        something {}. | Suggest something {}, please. | Please find me something {}. | I would like to try an
        item {}. | Can you suggest something new {}? | Do you have something {} for me?""",
    "misinformed": """I am looking for something {}. | Can you recommend an item {}? | I want another
        item {}. | Please find something {}. | What else is there {}? | Do you know something {}? | I would
        like something more {}. | Suggest an item {}. | Can you find me another item {}? | Please suggest
        something more {}. | Do you have something else {}? | I would like an item {}.""",
    "interest": """I like {}. What else would I like? | I enjoyed {}. Can you recommend something like
        that? | Lately I chose {}. Please suggest something similar. | My favourites are {}. Find me another
        like them. | I am fond of {}. What should I try next? | Having tried {}, I want more of the same. | I
        bought {} and liked both. What would you recommend? | Recommend something similar to {}. | I tried {}
        and enjoyed both. Please recommend another. | What would you suggest to me if I like {}? | My choice
        was {}. Can you find something similar? | I want something like {}."""}
TEMPLATES = {kind: " ".join(text.split()).split(" | ") for kind, text in TEMPLATES.items()}
KINDS = tuple(TEMPLATES)

def query_source(dataset, kinds=None, max_conditions=3, num_candidates=20, history_length=10, seed=0):
    """What draws a data set's requests: RecBench+'s files, or its attributes. Raises InputError."""
    if dataset.bench:
        from extras.recbench import RecBenchQueries
        return RecBenchQueries(dataset.bench, kinds, num_candidates, seed)
    return QueryBuilder(dataset, kinds, max_conditions, num_candidates, history_length, seed)

class QueryBuilder:
    """Requests of the given kinds (None: all). Raises InputError where the data have none of a kind."""

    def __init__(self, dataset, kinds=None, max_conditions=3, num_candidates=20, history_length=10, seed=0):
        self.dataset, self.kinds, self.seed, items = dataset, kinds or KINDS, seed, dataset.items
        self.max_conditions, self.num_candidates = max_conditions, num_candidates
        self.history_length, self.graph_items, holders = history_length, items.values, {}
        # Two items of one title cannot be told apart: never both in a request or among its candidates.
        self.keys = {i: title_key(item.title) for i, item in items.items()}
        for i, item in items.items():
            for pair in attribute_pairs(item):
                holders.setdefault(pair, []).append(i)
        self.with_pair = {pair: ids for pair, ids in holders.items() if 3 <= len(ids) <= len(items) // 2}
        self.pairs = {i: [p for p in attribute_pairs(x) if p in self.with_pair] for i, x in items.items()}
        if not self.with_pair or not set(self.kinds) <= set(KINDS):
            raise InputError(f"{dataset.name}: the query kinds are {', '.join(KINDS)}, and items need "
                             f"attributes that several share")

    def draw(self, split, count, start=0):
        """`count` queries, the kinds in turn; `start`, the first round over the targets, gives other ones."""
        streams = {kind: self._stream(kind, split, start) for kind in self.kinds}
        return [next(streams[self.kinds[n % len(self.kinds)]]) for n in range(count)]

    def _stream(self, kind, split, start):
        targets = self.dataset.targets(split, f"{self.seed}/{kind}/{start}")
        for number in itertools.count(start):
            queries = filter(None, (self.query(kind, split, *target, number) for target in targets))
            if not (first := next(queries, None)):
                raise InputError(f"{self.dataset.name}: no {split} example gives a query of kind {kind}; "
                                 f"leave that kind out, or lower --num-candidates")
            yield first
            yield from queries

    def query(self, kind, split, user, position, number=0):
        """The `number`-th query of a user's target, or None where it gives none of this kind."""
        rng = random.Random(f"{self.seed}/query/{split}/{user}/{position}/{kind}/{number}")
        items, sequence = self.dataset.items, self.dataset.sequences[user]
        positive, excluded = items[sequence[position].item_id], {x.item_id for x in sequence}
        before = sequence[max(0, position - self.history_length):position]
        past = [items[x.item_id] for x in before if x.item_id != positive.id]
        phrases, conditions, wrong = (self._common_interest(rng, past, positive) if kind == "interest" else
                                      self._conditions(rng, kind, positive, excluded))
        candidates = phrases and self._candidates(rng, positive, conditions, wrong, excluded)
        if not candidates:
            return None
        request = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
        text = rng.choice(TEMPLATES[kind][8:] if split == "test" else TEMPLATES[kind][:8]).format(request)
        return Query(f"{split}/{user}/{position}/{kind}/{number}", text, kind, len(conditions), candidates,
                     (positive.id,), user, past, tuple(conditions))

    def _common_interest(self, rng, past, positive):
        """Two items of the past, and all that they have in common; returns what `_conditions` does."""
        couples = [(a, b) for n, a in enumerate(past) for b in past[:n] if self.keys[a.id] != self.keys[b.id]]
        for a, b in rng.sample(couples, len(couples)):
            common = [p for p in self.pairs[a.id] if p in self.pairs[b.id]]
            if 0 < len(common) <= self.max_conditions and set(common) <= set(self.pairs[positive.id]):
                return [f"{a.title} and {b.title}"], common, None
        return [], [], None

    def _conditions(self, rng, kind, positive, excluded):
        """(phrases, the conditions, the pair given falsely or None): values of the positive in the words of
        the kind; no phrases where no item can stand for a value. Named items are added to `excluded`."""
        pairs, wrong, phrases = self.pairs[positive.id], None, []
        conditions = rng.sample(pairs, min(rng.randint(1, self.max_conditions), len(pairs)))
        for n, (name, value) in enumerate(conditions):
            plain = name.replace("_", " ")
            noun, wording = WORDING.get(name, (plain, f"with {plain}"))
            if kind == "explicit" or kind == "misinformed" and n > 0:
                phrases.append(f"{wording} {value}")
                continue
            named = self._items_for(rng, name, value, positive, excluded)
            true = {pair for x in (*named, positive) for pair in self.pairs[x.id]}
            false = [pair for pair in self.with_pair if pair[0] == name and pair not in true]
            if not named or kind == "misinformed" and not false:
                return [], [], None
            excluded |= {x.id for x in named}
            phrases.append(f"with the same {noun} as " + " and ".join(x.title for x in named))
            if kind == "misinformed":
                wrong = rng.choice(false)
                phrases[0] += f" ({noun} {wrong[1]}, if I remember rightly)"
        return phrases, conditions, wrong

    def _items_for(self, rng, name, value, positive, excluded):
        """Items that identify a value: one that has no other, or two that have no other in common."""
        keys = self.keys
        known = [i for i in self.with_pair[name, value] if i not in excluded and keys[i] != keys[positive.id]]
        known = [self.dataset.items[i] for i in rng.sample(known, min(8, len(known)))]
        for n, a in enumerate(known):
            if a.attributes[name] == (value,):
                return [a]
            for b in known[:n]:
                common = set(a.attributes[name]) & set(b.attributes[name])
                if common == {value} and keys[a.id] != keys[b.id]:
                    return [b, a]
        return []

    def _candidates(self, rng, positive, conditions, wrong, excluded):
        """The positive and negatives, shuffled, no two of one title; None where the catalogue has too few."""
        proposals = [rng.choice(self.with_pair[wrong])] if wrong else []
        for _ in range(self.num_candidates // 4 if len(conditions) > 1 else 0):
            proposals.append(rng.choice(self.with_pair[rng.choice(conditions)]))
        proposals += [rng.choice(self.dataset.item_ids) for _ in range(50 * self.num_candidates)]
        chosen = {self.keys[positive.id]: positive}  # by title
        for i in proposals:
            if i not in excluded and not set(conditions) <= set(self.pairs[i]):
                chosen.setdefault(self.keys[i], self.dataset.items[i])
        chosen = list(chosen.values())[:self.num_candidates]
        rng.shuffle(chosen)
        return chosen if len(chosen) == self.num_candidates else None
