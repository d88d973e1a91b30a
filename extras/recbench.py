"""RecBench+ (arXiv 2503.09382), which ReRec (arXiv 2604.07851) is measured on: its queries and its metrics.

Choices of ours:
  1. Negatives are uniform, without right items, history, and what is known to meet all conditions.
  2. The history of an interest query is what its users watched before (`predecessor_*`). The "Shared
     consecutive" items are the pool of right answers: neither shown nor drawn as negatives.
  3. Splits go by user, or without one by record: queries of one share right answers.
"""

import json
import math
import random
import re
from collections import defaultdict
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

from data import SPLITS, InputError, Query, attribute_pairs, clean, make_item, read_lines, title_key
from extras.recbole import bad_line

FILES = {"explicit": "Explicit", "implicit": "Implicit", "misinformed": "Misinformed",
         "interest": "InterestBased", "demographics": "DemographicsBased"}  # and `Query.json`
TEXTS = ("query", "situational_description_query", "direct_description_query")
# Between the titles of a sequence: arrows and bars, commas after a year, commas between quotes.
SEQUENCE = re.compile(r"""\s*(?:->|→|\[SEP\]|\|)\s*|(?<=\(\d{4}\))\s*,\s*|['"],\s*['"]""")

class RecBench:
    """The catalogue and the queries in dataset/{domain}/ of a RecBench+ copy. Raises InputError.
    The catalogue is movies.dat (`id::title (year)::genre|genre`), books.dat (`id::title`), or where that is
    missing every book that a record names. Items have the attributes that *all* have: a movie's genres.
    holders: (relation, value) -> ids of the items known to have it, also from what the queries ask and hint.
    That is known of right items and hardly of others: a prompt that showed it would give the answer away.
    pools: query id -> ids of the right answers of its record. left_out: query id -> why it is no query."""

    def __init__(self, folder, domain, history_length=10):
        base = Path(folder).expanduser() / "dataset" / domain
        files = {kind: file for kind, name in FILES.items() if (file := base / f"{name}Query.json").is_file()}
        if domain not in ("movie", "book") or not files:
            raise InputError(f"{base}: no query file of movie or book; see github.com/jiani-huang/RecBench")
        self.domain, self.history_length, path = domain, history_length, base / f"{domain}s.dat"
        self.items, self.ids, self.holders = {}, {}, defaultdict(set)  # ids: key_of(title) -> id
        self.queries, self.pools, self.left_out = [], {}, {}
        self.grows = domain == "book" and not path.is_file()
        for number, line in () if self.grows else read_lines(path):
            item_id, _, title = map(str.strip, line.partition("::"))
            if not (item_id and title):
                raise bad_line((path, number), "id::title", line)
            # A movie's title may hold `::` too: genres are the last field.
            title, *genres = title.rsplit("::", 1) if domain == "movie" else [title]
            self.add(item_id, title, "".join(genres).split("|"))
        for kind, path in files.items():
            number = 0
            try:
                for number, record in enumerate(json.loads(path.read_text("utf-8-sig"))):
                    self.add_queries(kind, record, number)
            except Exception as error:  # of the many kinds that a malformed record may raise
                raise InputError(f"{path} record {number}: expected JSON, a list of records with text, "
                                 f"titles and conditions; {error!r}") from None

    def add(self, item_id, title, genres=()):
        # Characters lost upstream (U+FFFD) are dropped: no model could copy them into an answer.
        item = self.items[item_id] = make_item(item_id, title.replace("\ufffd", ""), {"genre": genres})
        self.ids.setdefault(key_of(title), item_id)
        for pair in attribute_pairs(item):
            self.holders[pair].add(item_id)

    def find(self, titles, ids=()):
        """The ids of titles that are there. A known id goes before its title, which may be misencoded."""
        found = {}
        for title, item_id in zip(titles, ids or titles, strict=True):
            key, name = key_of(title), clean(title)
            known = (str(item_id), name, self.ids.get(key) if key[0] else None)
            if self.grows and name and self.items.keys().isdisjoint(known):
                self.add(name, title)
            found |= dict.fromkeys([i for i in known if i in self.items][:1])
        return list(found)

    def add_queries(self, kind, record, number):
        """Add the queries of one record of a file. A malformed record raises."""
        domain, several = self.domain, kind in ("interest", "demographics")
        group = f"{domain}-{kind}-{clean(str(record.get('data_idx', number)))}"
        requests = record["query & ground true"] if several else [record]
        # The benchmark's evaluation counts the empty queries of books alone.
        requests = [r for r in requests if r or domain == "book"]
        titles = {n: r.get(f"{domain}Subset") or r[f"{domain} subset"] for n, r in enumerate(requests) if r}
        conditions = tuple((name.lower(), clean(v)) for name, v in record.get("sharedRelationships") or [])
        for hint in (record.get("multihop_info") or []) + (record.get("misinformed") or []):
            person = hint.get("original person") or hint["person"]  # of two, the latter is wrong
            self.holders[hint["relation"].lower(), clean(person)].update(self.find([hint[domain]]))
        past = [v for k, v in record.items() if k == "history_sample" or k.startswith("predecessor")]
        pool = [record.get(f"Shared consecutive {domain}s", [])]
        pool += titles.values() if kind == "interest" else ()
        past, pool = self.find(titles_in(past)), self.find(titles_in(pool))
        for n, listed in titles.items():
            text = next(requests[n][name] for name in TEXTS if name in requests[n]).split()
            text = " ".join(filter(None, map(clean, text)))  # by words: `clean` cuts at a title's length
            if not (text and isinstance(listed, list) and all(map(str.strip, listed))):
                raise ValueError(f"text {text[:60]!r}, titles {str(listed)[:60]}")
            name = f"{group}-{n}" if several else group
            while name in self.pools:  # ids repeat in some files
                name += "+"
            truths, self.pools[name] = self.find(listed, requests[n].get(f"{domain}SubsetId")), pool
            for condition in conditions:
                self.holders[condition].update(truths)
            if not truths:
                self.left_out[name] = f"not in the catalogue: {clean(', '.join(listed))}"
                continue
            history = [self.items[i] for i in past if i not in pool and i not in truths]
            self.queries.append(Query(
                name, text, kind, len(conditions), [], tuple(truths), str(record.get("source_user") or group),
                history[max(0, len(history) - self.history_length):], conditions, tuple(listed)))

    def graph_items(self):
        """The catalogue with all that is known: for the item-attribute graph, never for a prompt."""
        attributes = {i: defaultdict(tuple) for i in self.items}
        for (name, value), ids in self.holders.items():
            for i in ids:
                attributes[i][name] += (value,)
        return [replace(item, attributes=attributes[i]) for i, item in self.items.items()]

def key_of(title):
    """`title_key` of the ASCII in a title: what it shares with its misencoded forms."""
    return title_key(title.encode("ascii", "ignore").decode())

def titles_in(value):
    """The titles in {title: count}, the most frequent last, in lists, nested, and in sequences."""
    if isinstance(value, (str, int, float)):
        return SEQUENCE.split(value) if isinstance(value, str) else []
    value = sorted(value, key=value.get) if isinstance(value, dict) else value
    return [title for entry in value for title in titles_in(entry)]

class RecBenchQueries:
    """The benchmark's queries as a source of requests, like QueryBuilder."""

    def __init__(self, bench, kinds=None, num_candidates=20, seed=0):
        self.bench, self.num_candidates, self.seed = bench, num_candidates, seed
        self.graph_items, there = bench.graph_items, {q.kind for q in bench.queries}
        if not there.issuperset(kinds or ()):
            raise InputError(f"these RecBench+ files hold {', '.join(sorted(there))} queries alone")
        self.splits = {split: [] for split in SPLITS}
        for q in bench.queries:
            u = random.Random(f"{seed}/split/{q.user}").random()
            if q.kind in (kinds or there):
                self.splits["train" if u < 0.8 else "validation" if u < 0.9 else "test"].append(q)

    def draw(self, split, count, start=0):
        """At most `count` queries, each once. start > 0: as many as asked for, with other negatives."""
        pool, seed = self.splits[split], f"{self.seed}/{start}" if start else self.seed
        if not pool:
            raise InputError(f"these RecBench+ files hold too few queries: the {split} split is empty")
        order = random.Random(f"{self.seed}/{split}/{start}").sample(pool, len(pool))
        order *= 1 + count // len(order) if start else 1
        return [self.with_candidates(q, random.Random(f"{seed}/{q.id}")) for q in order[:count]]

    def with_candidates(self, query, rng):
        """One right item and negatives, shuffled, no two of one title."""
        bench, met = self.bench, [self.bench.holders[condition] for condition in query.conditions]
        excluded = {*query.truths, *bench.pools[query.id], *(h.id for h in query.history)}
        excluded.update(set.intersection(*met) if met else ())
        taken = {key_of(bench.items[i].title) for i in excluded}
        wrong = [i for key, i in bench.ids.items() if key not in taken]
        if len(wrong) < self.num_candidates - 1:
            raise InputError(f"query {query.id}: only {len(wrong)} wrong titles; lower --num-candidates")
        positive = rng.choice(query.truths)
        chosen = [positive, *rng.sample(wrong, self.num_candidates - 1)]
        rng.shuffle(chosen)
        return replace(query, candidates=[bench.items[i] for i in chosen], truths=(positive,))

def open_ended(response, truths, match="recbench", domain="movie"):
    """Score an answer without candidates: {"precision", "recall", "ndcg": float, "ftr": bool}.
    truths: the right titles as the data write them. ftr (fail to recommend): no [SEP] in the response.
    match="recbench": the benchmark's rule, without its knowledge graph; it reproduces the published scores. A
      prediction hits the first truth with a SequenceMatcher ratio >= 0.8. A movie loses quotes and year, its
      truth does not. A truth hit twice counts twice in NDCG alone, which can exceed 1.
    match="exact" (ours): equal names, and equal years where both have one. Each truth is hit once."""
    parts, truths, hits = response.split("[SEP]"), list(truths), []
    if match == "exact":
        predictions = [title_key(p.strip()[:300]) for p in parts if p.strip()]  # no title is longer
        truths = [key for key in dict.fromkeys(map(title_key, truths)) if key[0]]
        for name, year in predictions[:200]:  # of a longer list the rest hits nothing
            left = (t for t in truths if t[0] == name and t not in hits)
            hits.append(next((t for t in left if t[1] == year or "" in (t[1], year)), None))
    else:
        predictions = [p.strip().strip("'").strip('"').strip() for p in parts]
        predictions = [re.sub(r"\s\(\d{4}\)$", "", p).strip() for p in predictions]
        if domain == "book":
            # The benchmark strips these characters, not this text; nothing is stripped of a single title.
            predictions = response.strip().strip("Recommended books (separated by [SEP]):").split("[SEP]")
        for prediction in predictions[:200]:
            hits.append(next((t for t in truths if prediction.strip() and similar(prediction, t)), None))
    discounts = [1 / math.log2(rank + 2) for rank in range(len(hits) + len(truths))]
    gain = sum(discount for discount, hit in zip(discounts, hits) if hit is not None)
    num_hit = sum(t in hits for t in truths)  # 0 where there are no truths, or no predictions
    return {"precision": num_hit / max(1, len(predictions)), "recall": num_hit / max(1, len(truths)),
            "ndcg": gain / max(1.0, sum(discounts[:len(truths)])), "ftr": len(parts) == 1}

def similar(prediction, truth):
    """The benchmark's rule."""
    matcher = SequenceMatcher(None, prediction, truth)
    # The quick ratio is an upper bound: it stops a megabyte at once.
    return matcher.real_quick_ratio() >= 0.8 and matcher.ratio() >= 0.8

def read_responses(path, bench):
    """[(query, response)] of a JSONL of {"id", "response"}: the query's id, or the benchmark's ("3862" of
    movie-explicit-3862) with "kind" where several kinds have it. Raises InputError."""
    queries, problems, pairs = {q.id: q for q in bench.queries}, dict(bench.left_out), []
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
            name, response = str(record["id"]), str.strip(record["response"])
            kinds = [record["kind"]] if record.get("kind") else FILES
        except Exception:
            raise bad_line((path, number), '{"id", "response": text}', line) from None
        found = [i for i in (name, *(f"{bench.domain}-{k}-{name}" for k in kinds)) if i in bench.pools]
        unclear = f'it is of {", ".join(found) or "no query"}; add "kind"'
        if problem := problems.get(found[0]) if len(found) == 1 else unclear:
            raise InputError(f"{path} line {number}: id {name!r}: {problem}; or remove this line")
        problems[found[0]] = f"answered on line {number} already"
        pairs.append((queries[found[0]], response))
    return pairs

def evaluate_open_ended(dataset, path, out):
    """Print and write the metrics of a file of answers, means over the answered."""
    from eval import intervals
    bench, names = dataset.bench, ("precision", "recall", "ndcg", "ftr")
    pairs = read_responses(path, bench) if bench else []
    if not pairs:
        raise InputError(f"--open-ended {path}: give a file with answers, and --data recbench:movie or :book")
    kinds = sorted({q.kind for q, _ in pairs})
    report = {"data": dataset.name, "answered": len(pairs), "of": sum(q.kind in kinds for q in bench.queries)}
    print(f"{dataset.name}: answered {len(pairs)} of {report['of']} ({', '.join(kinds)}); report in {out}")
    for match in ("recbench", "exact"):
        rows = {q.id: open_ended(text, q.titles, match, bench.domain) for q, text in pairs}
        columns = {name: [float(row[name]) for row in rows.values()] for name in names}
        report[match] = intervals(columns, [q.user for q, _ in pairs]) | {"queries": rows}
        print(f"{match:<9}" + "".join(f"  {name} {report[match][name]['mean']:.4f}" for name in names))
    Path(out).write_text(json.dumps(report, indent=1) + "\n")
