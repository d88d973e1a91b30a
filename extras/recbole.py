"""Your data: a folder of RecBole atomic files. And `assemble`, which makes a Dataset of any source's rows.

The files are tab-separated with a typed header, `field:type`; in a folder there are
    NAME.inter   user_id:token, item_id:token, and where known rating:float, timestamp:float
                 (or NAME.train.inter, NAME.valid.inter and NAME.test.inter: their split is kept)
    NAME.item    item_id:token, title:token_seq (or movie_title, name); other token columns are attributes
    NAME.kg, NAME.link   knowledge: head_id, relation_id, tail_id; which head an item_id is (optional)

Choices of ours: interactions of a user at the same time stay in the file's order; where there are times, the
very same row twice is one interaction.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import datetime, timezone
from operator import itemgetter

from data import MISSING, SPLITS, Dataset, InputError, Interaction, clean, make_item, read_lines

FIRST, LAST = (datetime(year, 1, 1, tzinfo=timezone.utc).timestamp() for year in (1990, 2101))
TIMES = ("on every line a time from 1990 to 2100 (in s, ms, us or ns, as YYYYMMDD, YYYYMMDDhhmmss or an ISO "
         "date)")
TYPES = {"token", "token_seq", "float", "float_seq"}
TIME_NAME = re.compile(r"time|date|stamp|^(ts|t|when|day)$|_(ts|at)$")
# Ids of Freebase and Wikidata, and addresses: nothing that a model or a reader could make sense of.
OPAQUE = re.compile(r"/?[mg][./][0-9][0-9a-z_]*|(wd:)?[QP][0-9]+|<?https?://\S+")

def bad_line(where, expected, found):
    path, line = where
    return InputError(f"{path} line {line}: expected {expected}, found {str(found)[:80]!r}")

def split_fields(line, separator="\t"):
    """The fields of a line, "" where nothing is there; quoted ones, `"a ""b"" c"`, without their quotes."""
    fields = line.split(separator)
    if '"' in line:
        # Not `"Weird Al" Live`, nor `"A" and "B"`, whose marks are part of a title.
        quoted = [re.fullmatch('"((?:[^"]|"")*)"', field) for field in fields]
        fields = [match[1].replace('""', '"') if match else field for match, field in zip(quoted, fields)]
    return ["" if field.strip() in MISSING else field for field in fields]

def seconds(text):
    """A time as seconds since 1970; a number below 1e6 (a position) stays. Raises ValueError, see TIMES."""
    try:
        number = float(text)
    except ValueError:
        iso = text.strip().replace("/", "-").replace("Z", "+00:00")
    else:
        if abs(number) < 1e6:
            return number
        # Between 1990 and 2100 the units' numbers, and those of dates written as digits, are all different.
        for unit in (1, 1e3, 1e6, 1e9):
            if FIRST <= number / unit < LAST:
                return number / unit
        digits = f"{number:.0f}"
        iso = f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}"
        if len(digits) > 8:
            iso += f" {digits[8:10]}:{digits[10:12]}:{digits[12:]}"
    moment = datetime.fromisoformat(iso)
    value = moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()
    if not FIRST <= value < LAST:
        raise ValueError(text)
    return value

def assemble(name, items, rows, catalogue="the catalogue", presplit=False):
    """A Dataset of rows ((path, line), user, item, time, rating, split) in file order. Raises InputError.

    Its splits stay empty unless presplit; `split` is an index in SPLITS, the other fields are text.
    """
    dataset = Dataset(name, items)
    found, first_of = defaultdict(list), {}
    for where, user, item, time, rating, split in rows:
        if user in MISSING or item in MISSING or item not in items:
            raise bad_line(where, f"a user_id and an item_id of {catalogue}", f"{user}, {item}")
        try:
            stamp = 0.0 if time in MISSING else seconds(time)
            stars = None if rating in MISSING else float(rating)
            if not math.isfinite(stars or 0):
                raise ValueError
        except (ValueError, OverflowError):
            raise bad_line(where, f"a number as rating and {TIMES}", f"{rating}, {time}") from None
        kind = "blank" if time in MISSING else "position" if abs(stamp) < 1e6 else "time"
        first_of.setdefault(kind, where)
        found[user].append((split, stamp, Interaction(item, stamp, stars)))
    if len(first_of) > 1:
        kind = "blank" if "blank" in first_of else "position"
        raise bad_line(first_of[kind], TIMES, kind)
    dataset.has_clock = "time" in first_of
    for user, entries in found.items():
        if "blank" not in first_of:
            entries = list(dict.fromkeys(entries))
        entries.sort(key=itemgetter(0, 1))
        dataset.sequences[user] = [interaction for _, _, interaction in entries]
        if presplit:
            dataset.train_length[user] = sum(split == 0 for split, _, _ in entries)
            # The first interaction has no history to predict it from.
            for position, (split, _, _) in enumerate(entries[1:], start=1):
                dataset.splits[SPLITS[split]].append((user, position))
    return dataset

def k_core(dataset, core):
    """Users and items with at least `core` interactions, until nothing more falls out."""
    sequences, before = dataset.sequences, None
    while before != (before := sum(map(len, sequences.values()))):
        counts = Counter(x.item_id for s in sequences.values() for x in s)
        sequences = {u: [x for x in s if counts[x.item_id] >= core] for u, s in sequences.items()}
        sequences = {u: s for u, s in sequences.items() if len(s) >= core}
    if not sequences:
        raise InputError(f"{dataset.name}: --core {core} leaves no interaction; lower it")
    items = {i: item for i, item in dataset.items.items() if i in counts}
    return replace(dataset, sequences=sequences, items=items)

def read_folder(folder):
    """The Dataset in a folder. Raises InputError that names the file, the line and what is expected."""
    names = sorted(path.name for path in folder.glob("*.inter"))
    name = re.sub(r"(\.test)?\.inter$", "", names[0]) if names else "NAME"  # test comes first in the alphabet
    endings = ("train", "valid", "test") if len(names) == 3 else ()
    expected = [f"{name}.{ending}.inter" for ending in endings] or [f"{name}.inter"]
    if sorted(expected) != names:
        raise InputError(f"{folder}: expected one NAME.inter, or NAME.train.inter, NAME.valid.inter and "
                         f"NAME.test.inter, found {', '.join(names) or 'none'}")
    knowledge = read_knowledge(folder / f"{name}.kg", folder / f"{name}.link")
    items = read_items(folder / f"{name}.item", knowledge)

    def rows():
        for split, path in enumerate(folder / file for file in expected):
            types, table = read_table(path, "user_id", "item_id")
            if "item_id_list" in types:
                raise InputError(f"{path}: item_id_list is not read; write a line an interaction: "
                                 f"user_id, item_id, timestamp")
            if "timestamp" not in types:
                alike = [column for column in types if TIME_NAME.search(column.lower())]
                rename = f"; if `{alike[0]}` is the time, rename it to timestamp" if alike else ""
                print(f"note: {path.name} has no column `timestamp`: the order of its lines is taken as "
                      f"time{rename}", file=sys.stderr)
            for number, row in table:
                yield ((path, number), row["user_id"], row["item_id"], row.get("timestamp", ""),
                       row.get("rating", ""), split)

    return assemble(name, items, rows(), f"{name}.item", presplit=len(names) == 3)

def read_table(path, *required):
    """A file with a typed header: (column -> type, iterator over (line number, {column: text or ""}))."""
    lines = ((number, split_fields(line)) for number, line in read_lines(path))
    types = dict(cell.strip().partition(":")[::2] for cell in next(lines, (1, []))[1])
    if not types.keys() >= {*required} or not {*types.values()} <= TYPES:
        raise bad_line((path, 1), f"a header of `field:type` with tabs between, {', '.join(required)} and "
                                  f"types of {', '.join(sorted(TYPES))}", ", ".join(types))

    def rows():
        for number, fields in lines:
            if len(fields) != len(types):
                raise bad_line((path, number), f"{len(types)} fields with tabs between", "\t".join(fields))
            yield number, dict(zip(types, fields))

    return types, rows()

def read_items(path, knowledge):
    """The catalogue. knowledge: item id -> {relation: names}, which become attributes too."""
    types, rows = read_table(path, "item_id")
    titles = sorted((n for n in types if "title" in n or n == "name"), key="title".__ne__)
    if not titles:
        raise InputError(f"{path}: no column `title`, `movie_title` or `name`; it has {', '.join(types)}")
    features = [n for n in types if n not in ("item_id", titles[0]) and types[n].startswith("token")]
    items, line_of = {}, {}
    for number, row in rows:
        item_id, attributes = row["item_id"], {}
        if not item_id or item_id in items:
            other = f"another item_id than line {line_of.get(item_id, number)}"
            raise bad_line((path, number), other, item_id)
        line_of[item_id] = number
        for name in features:
            by_bar = "|" in row[name] or types[name] == "token"
            attributes[name] = tuple(row[name].split("|" if by_bar else None))
        for relation, names in knowledge.get(item_id, {}).items():
            if tuple(names) not in attributes.values():  # the same genres twice only lengthen the prompt
                attributes[relation] = tuple(names)
        items[item_id] = make_item(item_id, row[titles[0]], attributes)
    return items

def read_knowledge(graph, link):
    """Where both files are there: item id -> {relation: names}. Tails that are no names are left out."""
    if not (graph.exists() and link.exists()):
        return {}
    entity_of = {row["item_id"]: row["entity_id"] for _, row in read_table(link, "item_id", "entity_id")[1]}
    columns = ("head_id", "relation_id", "tail_id")
    triples = [tuple(row[c] for c in columns) for _, row in read_table(graph, *columns)[1]]
    linked = set(entity_of.values())
    entities = linked.union(head for head, _, _ in triples)
    names, dropped = defaultdict(lambda: defaultdict(dict)), []
    for head, relation, tail in triples:
        if head in linked and (tail in entities or OPAQUE.fullmatch(tail)):
            dropped.append(tail)
        elif head in linked:
            names[head][clean(relation)][tail] = None  # a dict, for an ordered set
    if dropped:
        print(f"note: {graph.name}: {len(dropped)} tails are ids, not names (such as {dropped[0]!r}); they "
              f"are left out", file=sys.stderr)
    return {item: names[entity] for item, entity in entity_of.items() if entity in names}
