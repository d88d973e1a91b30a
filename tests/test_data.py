"""Folders, downloads, splits, candidates: what is read, that nothing leaks, and that bad input is named."""

import ast
import contextlib
import gzip
import json
import math
import random
from collections import Counter
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

import data
from data import InputError, Item
from extras import recbole, sources

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\n"
THINGS = ITEM + "".join(f"i{n}\tThing {n:03d}\tBrand {n % 7}\tAll|Kind {n % 5}\n" for n in range(60))

def write(folder, item=THINGS, name="shop", **files):
    """A folder with NAME.item and, by ending (`train_inter` is .train.inter), other files: text or bytes."""
    folder.mkdir(exist_ok=True)
    for ending, text in {"item": item, **files}.items():
        path = folder / f"{name}.{ending.replace('_', '.')}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder

def load(folder, **options):
    return data.load(str(folder), **options)

def ids(sequence):
    return [x.item_id for x in sequence]

def error_of(folder, read=load, **options):
    with pytest.raises(InputError) as error:
        read(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)

@pytest.fixture
def shop(tmp_path):
    """40 users, 60 items, real timestamps with ties, written in shuffled order."""
    rng = random.Random(0)
    lines = [f"u{u}\ti{i}\t{rng.randint(1, 5)}\t{1_600_000_000 + 86400 * rng.randint(0, 60)}\n"
             for u in range(40) for i in rng.sample(range(60), rng.randint(4, 15))]
    rng.shuffle(lines)
    return write(tmp_path / "shop", inter=INTER + "".join(lines))

def test_history_lines_carry_age_and_rating(tmp_path):
    days = (0, 370, 395, 399, 400)
    inter = "".join(f"a\ti{n}\t{n + 1}\t{1_600_000_000 + 86400 * d}\n" for n, d in enumerate(days))
    d = load(write(tmp_path / "s", "item_id:token\tname:token\tbrand:token\n"
                   + "".join(f"i{n}\tThing {n}\tB\n" for n in range(40)), inter=INTER + inter))
    assert [data.describe(h) for h in d.example(("a", 4), num_candidates=5).history] == [
        "1 year ago: Thing 0 (B, rated 1)", "1 month ago: Thing 1 (B, rated 2)",
        "5 days ago: Thing 2 (B, rated 3)", "1 day ago: Thing 3 (B, rated 4)"]
    assert data.describe(d.items["i4"]) == "Thing 4 (B)"

def test_leave_one_out(shop):
    d = load(shop)
    for user, sequence in d.sequences.items():
        n = len(sequence)
        assert (user, n - 1) in d.splits["test"] and (user, n - 2) in d.splits["validation"]
        assert [p for u, p in d.splits["train"] if u == user] == list(range(1, n - 2))
        assert d.train_length[user] == n - 2

def test_temporal_split_orders_time_and_keeps_its_shares(shop):
    d = load(shop, split="temporal")
    times = {s: [d.sequences[u][p].timestamp for u, p in d.splits[s]] for s in d.splits}
    assert max(times["train"]) < min(times["validation"]) and max(times["validation"]) < min(times["test"])
    total = sum(map(len, times.values()))
    assert total == sum(len(s) - 1 for s in d.sequences.values())
    assert 0.7 < len(times["train"]) / total <= 0.8 and 0.02 < len(times["validation"]) / total < 0.2
    border = min(times["validation"])
    for user, n in d.train_length.items():
        assert sum(x.timestamp < border for x in d.sequences[user]) == n

@pytest.mark.parametrize("split", ["leave-one-out", "temporal", "toy"])
def test_nothing_held_out_reaches_training(shop, split):
    """No held-out (user, item) pair in a training prompt, as history, positive or negative, nor in counts."""
    d = data.load("toy") if split == "toy" else load(shop, split=split)
    held_out = {(u, d.sequences[u][p].item_id) for s in ("validation", "test") for u, p in d.splits[s]}
    seen = set()
    for e in d.examples("train", num_candidates=8):
        seen |= {(e.user, x.id) for x in e.history + e.candidates}
    assert not seen & held_out
    assert d.popularity() == Counter(i for u, s in d.sequences.items() for i in ids(s[:d.train_length[u]]))
    assert not any(p < d.train_length[u] for s in ("validation", "test") for u, p in d.splits[s])

def test_candidates_and_history(shop, tmp_path):
    d = load(shop)
    places = []
    for user, p in d.splits["test"]:
        e = d.example((user, p), num_candidates=20, history_length=3, seed=3)
        assert [h.id for h in e.history] == ids(d.sequences[user][max(0, p - 3):p])
        chosen = [c.id for c in e.candidates]
        assert len(set(chosen)) == 20 and sorted(e.relevance) == [0.0] * 19 + [1.0]
        places.append(e.relevance.index(1.0))
        positive = chosen.pop(places[-1])
        assert positive == d.sequences[user][p].item_id and not set(chosen) & set(ids(d.sequences[user]))
    assert len(set(places)) > 10  # shuffled: the positive is anywhere
    inter = INTER + "".join(f"a\t{i}\t5\t{n + 1}\n" for n, i in enumerate(("i1", "i2", "i1", "i3", "i1")))
    e = load(write(tmp_path / "s", inter=inter)).example(("a", 4), num_candidates=5, history_length=2)
    assert [h.id for h in e.history] == ["i2", "i3"]  # a target bought before is not in its history

def test_negatives_follow_popularity_and_category(shop):
    counts = load(shop).popularity()
    drawn = {}
    for negatives in data.NEGATIVES:
        lists = load(shop, negatives=negatives).examples("test", num_candidates=6)
        drawn[negatives] = [(c, e.candidates[e.relevance.index(1.0)]) for e in lists for c in e.candidates]
    mean = {name: sum(counts[c.id] for c, _ in pairs) / len(pairs) for name, pairs in drawn.items()}
    same = {name: sum(c.attributes["categories"] == p.attributes["categories"] for c, p in pairs) / len(pairs)
            for name, pairs in drawn.items()}
    assert mean["popularity"] > mean["uniform"] + 0.2 and same["category"] > 0.9 > 0.5 > same["uniform"]

def test_lists_follow_the_seed_and_nothing_else(shop):
    d = load(shop)
    alone = d.example(d.splits["test"][7], 10, 5, seed=1)
    again = [e for e in load(shop).examples("test", None, 10, 5, seed=1) if e.user == alone.user]
    other = d.example(d.splits["test"][7], 10, 5, seed=2)
    assert data.fingerprint([alone]) == data.fingerprint(again) != data.fingerprint([other])
    assert [e.user for e in d.examples("test", 5, 10)] == [e.user for e in d.examples("test", 9, 10)][:5]

def test_core_is_a_fixed_point(tmp_path):
    rows = {"a": "123", "b": "123", "c": "14", "d": "45"}
    inter = INTER + "".join(f"{u}\ti{i}\t5\t{i}\n" for u, row in rows.items() for i in row)
    folder = write(tmp_path / "s", inter=inter)
    d = load(folder, core=2)  # 5 goes, so d goes, so 4 goes, so c goes
    assert {u: ids(s) for u, s in d.sequences.items()} == dict.fromkeys("ab", ["i1", "i2", "i3"])
    assert list(d.items) == ["i1", "i2", "i3"]
    assert "lower it" in error_of(folder, core=4)

def test_times_in_every_form_are_the_same_second():
    """Any moment from 1990 to 2100, in any unit or form, is read as that moment."""
    rng = random.Random(1)
    for moment in [631152000, 4133980799] + [rng.randrange(631152000, 4133980799) for _ in range(200)]:
        for text in (str(moment), f"{moment}.0", f"{moment}000", f"{moment}000000", f"{moment}000000000",
                     repr(moment * 1e3), f"{moment:.10e}"):
            assert recbole.seconds(text) == pytest.approx(moment, abs=0.01)
        date = datetime.fromtimestamp(moment, timezone.utc)
        for form in ("%Y%m%d%H%M%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y/%m/%d %H:%M:%S"):
            assert recbole.seconds(date.strftime(form)) == moment
        for form in ("%Y%m%d", "%Y-%m-%d"):
            assert recbole.seconds(date.strftime(form)) == moment // 86400 * 86400

def test_times_decide_the_order_and_positions_are_no_clock(tmp_path, capsys):
    inter = INTER + "a\ti1\t4\t2014-05-14\na\ti2\t4\t20140513\na\ti3\t4\t1399852800000\na\ti4\t4\t20140513\n"
    d = load(write(tmp_path / "s", inter=inter))
    assert ids(d.sequences["a"]) == ["i3", "i2", "i4", "i1"] and d.has_clock  # i2, i4 tie: file order
    for times in (["1", "2", "3"], ["0", "0.5", "9e5"], ["", "nan", "NULL"]):
        inter = INTER + "".join(f"a\ti{n}\t5\t{t}\n" for n, t in enumerate(times))
        folder = write(tmp_path / "t", inter=inter)
        assert "timestamps" in error_of(folder, split="temporal")
        assert ids(load(folder).sequences["a"]) == ["i0", "i1", "i2"]
        assert all(h.ago == "" for h in load(folder).example(("a", 2)).history)
    capsys.readouterr()
    load(write(tmp_path / "u", inter=INTER.replace("timestamp", "review_date") + "a\ti1\t5\t1\n"))
    note = capsys.readouterr().err
    assert "`review_date`" in note and "order of its lines" in note and note.count("\n") == 1

def test_files_that_are_split_keep_their_split(tmp_path):
    parts = {"train_inter": "a\ti2\t1500000002\na\ti1\t1500000001\nb\ti5\t1500000009\n",
             "valid_inter": "a\ti3\t1500000000\n", "test_inter": "a\ti4\t1500000007\nb\ti6\t1500000003\n"}
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    folder = write(tmp_path / "s", **{ending: header + rows for ending, rows in parts.items()})
    d = load(folder)
    assert {u: ids(s) for u, s in d.sequences.items()} == {"a": ["i1", "i2", "i3", "i4"], "b": ["i5", "i6"]}
    assert d.name == "shop" and d.train_length == {"a": 2, "b": 1} and d.has_clock
    assert d.splits == {"train": [("a", 1)], "validation": [("a", 2)], "test": [("a", 3), ("b", 1)]}
    assert "split already" in error_of(folder, core=2)

@pytest.mark.parametrize("nothing", ["nan", "NaN", "None", "NULL", "null", "<NA>", "N/A", "NA", "", " "])
def test_missing_values_are_empty_and_missing_ids_are_bad(tmp_path, nothing):
    d = load(write(tmp_path / "s", ITEM + f"x\t{nothing}\t{nothing}\tA|{nothing}\ny\tY\tB\tC\n",
                   inter=INTER + f"a\tx\t{nothing}\t1\n"))
    assert d.items["x"] == Item("x", "") and d.items["x"].title == "untitled A"
    assert d.items["x"].attributes == {"categories": ("A",)}
    assert d.sequences["a"] == [("x", 1.0, None)]
    for row, name in ((f"{nothing}\ti1\t1\t1\n", "user_id"), (f"a\t{nothing}\t1\t1\n", "item_id")):
        error = error_of(write(tmp_path / "t", inter=INTER + "a\ti2\t1\t1\n" + row))
        assert "shop.inter line 3" in error and name in error

def test_quoted_fields_are_unquoted_and_titles_keep_their_marks(tmp_path):
    item = ITEM + '"x"\t"Say ""hi"""\t"OPI"\tMakeup|Nails\ny\t"Weird Al" Live\tB\tA\nz\t"A" and "B"\t12"\tA\n'
    d = load(write(tmp_path / "s", item, inter='"user_id:token"\t"item_id:token"\n"U0"\t"x"\nU0\ty\n'))
    assert [d.items[i].title for i in "xyz"] == ['Say "hi"', '"Weird Al" Live', '"A" and "B"']
    assert data.attribute_pairs(d.items["x"]) == [
        ("brand", "OPI"), ("categories", "Makeup"), ("categories", "Nails")]
    assert ids(d.sequences["U0"]) == ["x", "y"]
    assert recbole.split_fields('"a ""b""",c,,"d"', ",") == ['a "b"', "c", "", "d"]

def test_encodings_and_line_ends(tmp_path):
    """UTF-8 and Latin-1 even in one file; byte-order marks; U+2028 and U+0085 end no line."""
    latin, utf8 = "x\tCafé\tB\tK\r\n".encode("latin-1"), "y\tÉté\u2028a\x85b\tB\tK\n".encode()
    item = b"\xef\xbb\xbf" + ITEM.encode() + latin + utf8
    d = load(write(tmp_path / "s", item, inter="\ufeff" + INTER + "a\tx\t5\t1\r\na\ty\t5\t2\r\n"))
    assert [d.items[i].title for i in "xy"] == ["Café", "Été a b"] and ids(d.sequences["a"]) == ["x", "y"]
    assert "shop.inter line 1" in error_of(write(tmp_path / "t", inter=INTER.encode("utf-16")))

def test_clean_and_title_key():
    assert data.clean("a\tb\n c\u200b\u202e\x00 ") == "a b c"
    assert len(data.clean("x" * 10**5)) == data.MAX_TEXT and data.clean("") == data.clean(None) == ""
    assert data.clean("&amp;amp;quot;Tom &amp;amp; Jerry&amp;quot;") == '"Tom & Jerry"'
    for one, other in (("Godfather, The (1972)", '"the  Godfather" (1972)'), ("L’Avare", "l'avare.")):
        assert data.title_key(one) == data.title_key(other)
    assert data.title_key("The Fly (1958)") != data.title_key("The Fly (1986)")

def test_other_bad_input(tmp_path, shop, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert data.load("toy").name == "toy" and "./toy" in capsys.readouterr().err
    d = load(shop)
    d.splits["test"] = []
    assert "test split is empty" in error_of("test", d.examples, num_lists=1)
    (shop / "shop.item").unlink()
    assert "shop.item: cannot be read" in error_of(shop)
    (shop / "shop.inter").unlink()
    assert "expected one NAME.inter" in error_of(shop)

@pytest.mark.parametrize("inter, item, words", [
    ("user_id:token\titem:token\na\ti1\n", THINGS, ["shop.inter", "item_id"]),
    (INTER + "a\ti1\t4\n", THINGS, ["shop.inter line 2", "expected 4 fields"]),
    (INTER + "a\ti1\tgood\t1\n", THINGS, ["shop.inter line 2", "rating", "'good, 1'"]),
    (INTER + "a\ti1\t4\t1\na\tz\t4\t2\n", THINGS, ["shop.inter line 3", "'a, z'", "shop.item"]),
    (INTER, "item_id:token\tprice:float\nx\t3\n", ["no column `title`", "price"]),
    ("user_id\titem_id\n", THINGS, ["shop.inter line 1", "field:type"]),
    ("user_id:token\titem_id:tokens\n", THINGS, ["shop.inter line 1", "token_seq"]),
    ("", THINGS, ["shop.inter line 1", "user_id"]),
    (INTER, ITEM + "x\tA\tB\tK\ny\tA\tB\tK\nx\tC\tB\tK\n", ["shop.item line 4", "line 2", "'x'"]),
    (INTER, ITEM + "\tA\tB\tK\n", ["shop.item line 2", "an item_id"]),
    ("user_id:token\titem_id_list:token_seq\titem_id:token\n", THINGS, ["user_id, item_id, timestamp"]),
    *((INTER + f"a\ti1\t4\t1400000000\na\ti2\t4\t{text}\n", THINGS, ["shop.inter line 3", "time"])
      for text in ("19891231", "21010101", "20141332", "2014-13-01", "1969-12-31", "1e25", "inf", "-1.4e9",
                   "5000000", "0", "yesterday", "nan", "", "None")),
])
def test_bad_files_are_named(tmp_path, inter, item, words):
    error = error_of(write(tmp_path / "s", item, inter=inter))
    assert all(w in error for w in words), error

def test_lists_survive_a_file(shop, tmp_path):
    d = load(shop)
    lists = d.examples("test", 10, 8)
    data.save_lists(tmp_path / "lists", lists)
    again = data.read_lists(tmp_path / "lists", d.items)
    other = [replace(e, relevance=e.relevance[::-1]) for e in lists]
    assert again == lists and data.fingerprint(again) == data.fingerprint(lists) != data.fingerprint(other)
    shown = [[list(map(data.describe, e.history)) for e in each] for each in (lists, again)]
    assert shown[0] == shown[1]
    (tmp_path / "misses").write_text('{"candidates": ["i1", "i2"], "relevance": [0, 0]}\n')
    example, = data.read_lists(tmp_path / "misses", d.items, count_misses=True)
    assert example.relevance == [0, 0] and example.user == "line 1"

@pytest.mark.parametrize("change, words", [
    ({"relevance": [0, 0]}, ["not all 0"]),
    ({"history": ["c", "b"]}, ["none of them in the history"]),
    ({"candidates": ["a", "a"]}, ["different"]),
    ({"candidates": ["a", "nowhere"]}, ["'nowhere'"]),
    ({"relevance": [1, math.nan]}, ["relevance of 0 to 100"]),
    ({"candidates": None}, ["expected"]),
])
def test_lists_that_are_wrong_are_named(tmp_path, change, words):
    good = {"user": "u", "history": ["c"], "candidates": ["a", "b"], "relevance": [0, 1]}
    (tmp_path / "l").write_text(json.dumps(good) + "\n\n" + json.dumps(good | change) + "\n")
    error = error_of(tmp_path / "l", data.read_lists, items={i: Item(i, i) for i in "abc"})
    assert all(w in error for w in ["line 3", *words]), error

def test_a_download_that_fails_names_url_and_place(tmp_path, monkeypatch):
    for url in (tmp_path.as_uri() + "/none/", "foo/", "http://[::1/"):  # no test waits for a network
        monkeypatch.setattr(sources, "URL_2014", url)
        error, place = error_of("beauty", cache_dir=tmp_path), tmp_path / "amazon-2014"
        assert f"{url}reviews_Beauty_5.json.gz" in error and f"{place / 'reviews_Beauty_5.json.gz'}" in error
    assert "--cache-dir" in error_of("beauty", cache_dir=Path(__file__))

REVIEWS = [("A1", "B1", 5.0, 1300000000), ("A1", "B2", 3.0, 1200000000), ("A1", "B3", 4.0, 1400000000),
           ("A2", "B3", 1.0, 1350000000), ("A2", "B4", 2.0, 1360000000)]
JSON_REVIEWS = [json.dumps({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t, "summary": "fine"})
                for u, i, r, t in REVIEWS]
META_2014 = [
    "{'asin': 'B1', 'title': \"L'Oreal Mask &amp; Cream\", 'brand': 'L\\'Oreal', 'price': 3.5, 'categories': "
    "[['Beauty', 'Hair Care', 'Masks'], ['Beauty', 'X']], 'related': {'also_bought': ['B9', 'B2']}}",
    "{'asin': 'B9', 'title': 'not in the 5-core'}",
    "{'asin': 'B2', 'title': 'Caf\\xe9 soap', 'categories': [['Beauty']]}",
    "{'asin': 'B3', 'title': 'nan', 'brand': 'OPI', 'categories': [['Beauty', None, 'Nails']]}",
    "{'asin': 'B4', 'title': 3, 'brand': ['x'], 'categories': 'Beauty'}"]
META_2023 = [json.dumps(x) for x in (
    {"parent_asin": "B1", "title": "Game", "store": "Nintendo", "categories": ["Games", "PC", "Disks"]},
    {"parent_asin": "B2", "title": None, "store": None, "categories": []})]

def by_hand(folder, **files):
    """Put files where a download would be."""
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

def amazon_2014(cache, reviews=JSON_REVIEWS, meta=META_2014):
    by_hand(cache / "amazon-2014", **{"reviews_Beauty_5.json": reviews, "meta_Beauty.json": meta})
    return data.load("beauty", cache_dir=cache)

def amazon_2023(cache, ratings):
    ratings = ["user_id,parent_asin,rating,timestamp", *ratings]
    by_hand(cache / "amazon-2023", **{"Video_Games.csv": ratings, "meta_Video_Games.jsonl": META_2023})
    return data.load("amazon2023:Video_Games", cache_dir=cache)

def test_amazon_2014(tmp_path):
    d = amazon_2014(tmp_path, JSON_REVIEWS + JSON_REVIEWS[:2])  # the very same row twice is one
    assert [(i, x.title, x.attributes) for i, x in d.items.items()] == [
        ("B1", "L'Oreal Mask & Cream", {"brand": ("L'Oreal",), "categories": ("Hair Care", "Masks")}),
        ("B2", "Café soap", {"categories": ("Beauty",)}),
        ("B3", "untitled OPI Nails", {"brand": ("OPI",), "categories": ("Nails",)}), ("B4", "untitled", {})]
    assert d.sequences["A1"] == [("B2", 1.2e9, 3.0), ("B1", 1.3e9, 5.0), ("B3", 1.4e9, 4.0)] and d.has_clock
    assert d.splits == {"train": [("A2", 1)], "validation": [("A1", 1)], "test": [("A1", 2)]}  # leave-one-out

@pytest.mark.parametrize("factor", ["", "000", "000000", ".0"])
def test_amazon_2023_in_seconds_or_milliseconds(tmp_path, factor):
    d = amazon_2023(tmp_path, [f'"{u}",{i},{r},{t}{factor}' for u, i, r, t in REVIEWS])
    assert d.items["B1"].attributes == {"brand": ("Nintendo",), "categories": ("PC", "Disks")}
    assert d.items["B2"].title == "untitled" and list(d.items) == ["B1", "B2", "B3", "B4"]
    assert d.sequences["A1"] == [("B2", 1.2e9, 3.0), ("B1", 1.3e9, 5.0), ("B3", 1.4e9, 4.0)]
    assert d.splits == {"train": [("A1", 1), ("A2", 1)], "validation": [], "test": [("A1", 2)]}  # temporal
    assert "amazon2023:Video_Games" in error_of("amazon2023:../../etc", cache_dir=tmp_path)

@pytest.mark.parametrize("load, words", [
    (lambda c: amazon_2014(c, JSON_REVIEWS[:1] + ["{broken"]), ["_5.json.gz line 2", "reviewerID, asin"]),
    (lambda c: amazon_2014(c, [JSON_REVIEWS[0].replace("5.0", "Infinity")]), ["line 1", "as rating"]),
    (lambda c: amazon_2014(c, meta=META_2014 + ["{'asin': 'B4', 'title': __import__('os').system('true')}"]),
     ["meta_Beauty.json.gz line 6", "an object with asin"]),
    (lambda c: amazon_2023(c, ["A,B,5"]), ["Video_Games.csv.gz line 2", "user_id,parent_asin"]),
])
def test_broken_lines_are_named(tmp_path, load, words):
    error = error_of(tmp_path, load)
    assert all(w in error for w in words), error

def test_readers_survive_anything(tmp_path):
    """Random bytes and random mixtures of true lines: a result or an InputError, nothing else."""
    scraps = [JSON_REVIEWS[0], META_2014[0], "user_id,parent_asin,rating,timestamp", "A,B,5,1000", "[[[[",
              "user_id:token\titem_id:token", "item_id:token\ttitle:token_seq", "a\tb", "1\t1\t5", "\x00",
              '{"history": [], "candidates": ["a", "b"], "relevance": [1, 0]}', "null", '"', "(" * 500,
              "{'asin': 'B1', 'categories': 3}", '{"asin": {}, "reviewerID": []}', '"a""\t"b"']
    rng, one, two = random.Random(0), tmp_path / "one.gz", tmp_path / "two"
    for _ in range(150):
        mixtures = ["\n".join(rng.choices(scraps, k=rng.randrange(6))).encode() for _ in range(4)]
        first, second = rng.choices([*mixtures, rng.randbytes(99)], k=2)
        one.write_bytes(gzip.compress(first) if rng.random() < 0.8 else first)
        two.write_bytes(second)
        for ending in ("inter", "item"):
            (tmp_path / f"s.{ending}").write_bytes(rng.choice((first, second)))
        for read, *given in ((sources.read_amazon, "x", one, two, sources.review_2014, ast.literal_eval),
                             (sources.read_amazon, "x", one, two, sources.review_2023, json.loads),
                             (recbole.read_folder, tmp_path),
                             (data.read_lists, two, {i: data.Item(i, i) for i in "ab"})):
            with contextlib.suppress(InputError):
                read(*given)

def test_a_cut_or_damaged_download_is_fetched_again_and_then_named(tmp_path, monkeypatch):
    complete, arrives = gzip.compress(random.Random(0).randbytes(100_000)), []  # incompressible
    monkeypatch.setattr("torch.hub.download_url_to_file",
                        lambda url, path: Path(path).write_bytes(arrives.pop(0)))
    folder = tmp_path / "new" / "folder"
    for damaged in (complete[:-9], complete[:500] + b"\0\0\0" + complete[503:], b"<html>moved"):
        arrives[:] = [damaged, complete]
        for _ in range(2):  # the second time it is there
            path = sources.fetch("http://example.org/x.gz", folder)
            assert path.read_bytes() == complete and not arrives and list(folder.iterdir()) == [path]
        path.unlink()
        arrives[:] = [damaged, damaged]
        with pytest.raises(InputError, match="example.org/x.gz.*cut off or damaged.*yourself"):
            sources.fetch("http://example.org/x.gz", folder)
        assert not list(folder.iterdir())
    (tmp_path / "a.gz").write_bytes(complete[:-9])  # put there by hand
    with pytest.raises(InputError, match="a.gz: cannot be read .*delete it"):
        list(data.read_lines(tmp_path / "a.gz"))
