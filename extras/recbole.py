"""Your data: a folder of RecBole atomic files. And `assemble`, which makes a Dataset of any source's rows.

The files are tab-separated with a typed header, `field:type`; in a folder there are
    NAME.inter   user_id:token, item_id:token, and where known rating:float, timestamp:float
                 (or NAME.train.inter, NAME.valid.inter and NAME.test.inter: their split is kept)
    NAME.item    item_id:token, title:token_seq (or movie_title, name); other token columns are attributes

Choices of ours: interactions of a user at the same time stay in the file's order; where there are times, the
very same row twice is one interaction.
"""

import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import datetime, timezone
from operator import itemgetter

from data import MISSING, SPLITS, Dataset, InputError, Interaction, make_item, read_lines

FIRST, LAST = (datetime(year, 1, 1, tzinfo=timezone.utc).timestamp() for year in (1990, 2101))
TIMES = "on every line a time from 1990 to 2100 (s, ms, us, ns, YYYYMMDD, YYYYMMDDhhmmss or an ISO date)"
DIGITS = {8: "%Y%m%d", 14: "%Y%m%d%H%M%S"}
TYPES = ("float", "float_seq", "token", "token_seq")
TIME_NAME = re.compile(r"time|date|stamp|^(ts|t|when|day)$|_(ts|at)$")

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
        moment = datetime.fromisoformat(text.strip().replace("/", "-").replace("Z", "+00:00"))
    else:
        if abs(number) < 1e6:
            return number
        # Between 1990 and 2100 the units' numbers, and those of dates written as digits, are all different.
        for unit in (1, 1e3, 1e6, 1e9):
            if FIRST <= number / unit < LAST:
                return number / unit
        digits = f"{number:.0f}"
        moment = datetime.strptime(digits, DIGITS.get(len(digits), ""))
    value = moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()
    if not FIRST <= value < LAST:
        raise ValueError(text)
    return value

def assemble(name, items, rows, catalogue="the catalogue", presplit=False):
    """A Dataset of rows ((path, line), user, item, time, rating, split) in file order. Raises InputError.

    Its splits stay empty unless presplit; `split` is an index in SPLITS, the other fields are text.
    """
    dataset, found, first_of = Dataset(name, items), defaultdict(list), {}
    for where, user, item, time, rating, split in rows:
        if user in MISSING or item in MISSING or item not in items:
            raise bad_line(where, f"a user_id and an item_id of {catalogue}", f"{user}, {item}")
        try:
            stamp = 0.0 if time in MISSING else seconds(time)
            stars = None if rating in MISSING else float(rating)
            int(stars or 0)  # raises where it is infinite
        except (ValueError, OverflowError):
            raise bad_line(where, f"a number as rating and {TIMES}", f"{rating}, {time}") from None
        kind = "blank" if time in MISSING else "position" if abs(stamp) < 1e6 else "time"
        first_of.setdefault(kind, where)
        found[user].append((split, stamp, Interaction(item, stamp, stars)))
    if len(first_of) > 1:
        kind = min(first_of)  # in the alphabet: what is no time
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
    parts = [f"{name}.{part}.inter" for part in ("train", "valid", "test")]
    if names not in ([f"{name}.inter"], sorted(parts)):
        raise InputError(f"{folder}: expected one NAME.inter, or NAME.train.inter, NAME.valid.inter and "
                         f"NAME.test.inter, found {', '.join(names) or 'none'}")
    presplit = len(names) == 3
    files = enumerate(parts if presplit else names)
    rows = (row for split, file in files for row in read_interactions(folder / file, split))
    return assemble(name, read_items(folder / f"{name}.item"), rows, f"{name}.item", presplit)

def read_table(path, *required):
    """A file with a typed header: (column -> type, iterator over (line number, {column: text or ""}))."""
    lines = ((number, split_fields(line)) for number, line in read_lines(path))
    types = dict(cell.strip().partition(":")[::2] for cell in next(lines, (1, []))[1])
    if not types.keys() >= {*required} or not {*types.values()} <= {*TYPES}:
        expected = f"`field:type` with tabs between, {', '.join(required)}, and types of {', '.join(TYPES)}"
        raise bad_line((path, 1), expected, ", ".join(types))
    def rows():
        for number, fields in lines:
            if len(fields) != len(types):
                raise bad_line((path, number), f"{len(types)} fields with tabs between", "\t".join(fields))
            yield number, dict(zip(types, fields))
    return types, rows()

def read_interactions(path, split):
    """The rows of a file as `assemble` takes them."""
    types, rows = read_table(path, "user_id", "item_id")
    if "item_id_list" in types:
        raise InputError(f"{path}: item_id_list is not read; write lines of user_id, item_id, timestamp")
    if "timestamp" not in types:
        alike = [column for column in types if TIME_NAME.search(column.lower())]
        rename = f"; if `{alike[0]}` is the time, rename it to timestamp" if alike else ""
        print(f"note: {path.name} has no column `timestamp`: the order of its lines is taken as time{rename}",
              file=sys.stderr)
    for number, row in rows:
        fields = (row.get(name, "") for name in ("user_id", "item_id", "timestamp", "rating"))
        yield (path, number), *fields, split

def read_items(path):
    """The catalogue: item id -> Item."""
    types, rows = read_table(path, "item_id")
    titles = sorted((n for n in types if "title" in n or n == "name"), key="title".__ne__)
    if not titles:
        raise InputError(f"{path}: no column `title`, `movie_title` or `name`; it has {', '.join(types)}")
    features = [n for n in types if n not in ("item_id", titles[0]) and types[n].startswith("token")]
    items, line_of = {}, {}
    for number, row in rows:
        item_id, attributes = row["item_id"], {}
        if not item_id or item_id in items:
            expected = f"another item_id than line {line_of[item_id]}" if item_id else "an item_id"
            raise bad_line((path, number), expected, item_id)
        line_of[item_id] = number
        for name in features:
            by_bar = "|" in row[name] or types[name] == "token"
            attributes[name] = row[name].split("|" if by_bar else None)
        items[item_id] = make_item(item_id, row[titles[0]], attributes)
    return items
