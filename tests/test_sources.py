"""Public data sets: downloads from a server that misbehaves, and small files in the official formats."""

import ast
import contextlib
import gzip
import json
import random
from pathlib import Path

import pytest

import data
from data import InputError
from extras import recbole, sources

def test_a_download_that_fails_names_url_and_place(tmp_path, monkeypatch):
    for url in (tmp_path.as_uri() + "/none/", "foo/", "http://[::1/"):  # no test waits for a network
        monkeypatch.setattr(sources, "URL_2014", url)
        with pytest.raises(InputError) as error:
            data.load("beauty", cache_dir=tmp_path)
        assert f"{url}reviews_Beauty_5.json.gz" in str(error.value)
        assert str(tmp_path / "amazon-2014" / "reviews_Beauty_5.json.gz") in str(error.value)
    with pytest.raises(InputError, match="--cache-dir"):
        data.load("beauty", cache_dir=Path(__file__))

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
    assert [(i, x.title) for i, x in d.items.items()] == [
        ("B1", "L'Oreal Mask & Cream"), ("B2", "Café soap"), ("B3", "untitled OPI Nails"),
        ("B4", "untitled")]
    assert [x.attributes for x in d.items.values()] == [
        {"brand": ("L'Oreal",), "categories": ("Hair Care", "Masks")}, {"categories": ("Beauty",)},
        {"brand": ("OPI",), "categories": ("Nails",)}, {}]
    assert d.sequences["A1"] == [("B2", 1.2e9, 3.0), ("B1", 1.3e9, 5.0), ("B3", 1.4e9, 4.0)] and d.has_clock
    assert d.splits == {"train": [("A2", 1)], "validation": [("A1", 1)], "test": [("A1", 2)]}  # leave-one-out

@pytest.mark.parametrize("factor", ["", "000", "000000", ".0"])
def test_amazon_2023_in_seconds_or_milliseconds(tmp_path, factor):
    d = amazon_2023(tmp_path, [f'"{u}",{i},{r},{t}{factor}' for u, i, r, t in REVIEWS])
    assert d.items["B1"].attributes == {"brand": ("Nintendo",), "categories": ("PC", "Disks")}
    assert d.items["B2"].title == "untitled" and list(d.items) == ["B1", "B2", "B3", "B4"]
    assert d.sequences["A1"] == [("B2", 1.2e9, 3.0), ("B1", 1.3e9, 5.0), ("B3", 1.4e9, 4.0)]
    assert d.splits == {"train": [("A1", 1), ("A2", 1)], "validation": [], "test": [("A1", 2)]}  # temporal
    with pytest.raises(InputError, match="amazon2023:Video_Games"):
        data.load("amazon2023:../../etc", cache_dir=tmp_path)

@pytest.mark.parametrize("load, words", [
    (lambda c: amazon_2014(c, JSON_REVIEWS[:1] + ["{broken"]), ["_5.json.gz line 2", "reviewerID, asin"]),
    (lambda c: amazon_2014(c, [JSON_REVIEWS[0].replace("5.0", "Infinity")]), ["line 1", "as rating"]),
    (lambda c: amazon_2014(c, meta=META_2014 + ["{'asin': 'B4', 'title': __import__('os').system('true')}"]),
     ["meta_Beauty.json.gz line 6", "an object with asin"]),
    (lambda c: amazon_2023(c, ["A,B,5"]), ["Video_Games.csv.gz line 2", "user_id,parent_asin"]),
])
def test_broken_lines_are_named(tmp_path, load, words):
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value), error.value

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
