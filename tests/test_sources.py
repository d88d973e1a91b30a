"""Public data sets: downloads against a local server that misbehaves, and loaders on small files in the official formats."""

import contextlib
import gzip
import io
import json
import random
import subprocess
import sys
import threading
import time
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
from data import InputError

ROOT = Path(__file__).parent.parent
BIG = gzip.compress(random.Random(0).randbytes(1_000_000), mtime=0)  # incompressible


@contextlib.contextmanager
def server(files, cut=None, ranges=True, length=True, delay=0.0, status=None):
    """Serves {path: bytes}. cut: close the connection after so many bytes of each answer. Yields (base URL, requests seen)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self):
            seen.append((self.path, self.headers.get("Range")))
            if status or self.path not in files:
                return self.send_error(status or 404)
            body, start = files[self.path], 0
            asked = self.headers.get("Range")
            if asked and ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    return self.end_headers()
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if length:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            rest = body[start:][:cut]
            for at in range(0, len(rest), 65536):
                self.wfile.write(rest[at:at + 65536])
                self.wfile.flush()
                time.sleep(delay)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(data, "time", types.SimpleNamespace(sleep=lambda seconds: None))


def test_download_arrives_whole_and_once(tmp_path):
    with server({"/a.gz": BIG}) as (base, seen):
        path = data.fetch(f"{base}/a.gz", tmp_path)
        assert path == tmp_path / "a.gz" and path.read_bytes() == BIG
        assert data.fetch(f"{base}/a.gz", tmp_path) == path and len(seen) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gz", "a.gz.lock"]


@pytest.mark.parametrize("length", [True, False])
def test_a_cut_download_resumes_where_it_stopped(tmp_path, length):
    with server({"/a.gz": BIG}, cut=300_000, length=length) as (base, seen):
        assert data.fetch(f"{base}/a.gz", tmp_path).read_bytes() == BIG
    assert [r for _, r in seen] == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_process_resumes_the_part_file(tmp_path):
    (tmp_path / "a.gz.part").write_bytes(BIG[:123_456])
    with server({"/a.gz": BIG}) as (base, seen):
        assert data.fetch(f"{base}/a.gz", tmp_path).read_bytes() == BIG
    assert seen == [("/a.gz", "bytes=123456-")]


def test_a_whole_part_file_needs_no_more(tmp_path):
    (tmp_path / "a.gz.part").write_bytes(BIG)
    with server({"/a.gz": BIG}) as (base, seen):
        assert data.fetch(f"{base}/a.gz", tmp_path).read_bytes() == BIG
    assert len(seen) == 1


def test_a_server_without_ranges_sends_it_again(tmp_path):
    (tmp_path / "a.gz.part").write_bytes(b"x" * 1000)
    with server({"/a.gz": BIG}, ranges=False) as (base, _):
        assert data.fetch(f"{base}/a.gz", tmp_path).read_bytes() == BIG


@pytest.mark.parametrize("stale", [b"not gzip at all", BIG[:50_000] + b"!" + BIG[50_001:], BIG + BIG])
def test_a_wrong_part_file_is_thrown_away(tmp_path, stale):
    """Left over from another version of the file: the checksum tells, or the server's 416, and the download begins anew."""
    (tmp_path / "a.gz.part").write_bytes(stale)
    with server({"/a.gz": BIG}) as (base, _):
        assert data.fetch(f"{base}/a.gz", tmp_path).read_bytes() == BIG


def test_a_slow_server_is_waited_for(tmp_path):
    with server({"/a.gz": BIG}, delay=0.05) as (base, seen):
        assert data.fetch(f"{base}/a.gz", tmp_path, timeout=5).read_bytes() == BIG
    assert len(seen) == 1


def test_a_zip_cut_without_an_announced_length_resumes(tmp_path):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as z:
        z.writestr("x", BIG[:300_000])
    with server({"/a.zip": body.getvalue()}, cut=100_000, length=False) as (base, _):
        assert data.fetch(f"{base}/a.zip", tmp_path).read_bytes() == body.getvalue()


def test_urls_that_are_none(tmp_path):
    for mirror in ("foo", "http://[::1"):
        with pytest.raises(InputError, match="not a URL"):
            data.load("beauty", cache_dir=tmp_path, mirror=mirror)


@pytest.mark.parametrize("body, name", [(b"", "a.gz"), (b"", "a.zip"), (BIG[:-6], "a.gz"), (BIG[:5000] + b"\0\0\0" + BIG[5003:], "a.gz"), (b"<html>moved</html>", "a.gz"),
                                        (b"PK\3\4nonsense", "a.zip")])
def test_what_never_comes_whole_is_an_error_and_no_file(tmp_path, body, name):
    with server({f"/{name}": body}) as (base, _):
        with pytest.raises(InputError) as error:
            data.fetch(f"{base}/{name}", tmp_path)
    assert f"{base}/{name}" in str(error.value) and str(tmp_path / name) in str(error.value)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("status, tries", [(404, 1), (403, 1), (503, 3)])
def test_refusals_name_url_status_and_place(tmp_path, status, tries):
    with server({}, status=status) as (base, seen):
        with pytest.raises(InputError) as error:
            data.fetch(f"{base}/a.gz", tmp_path)
    assert len(seen) == tries and str(status) in str(error.value)
    assert f"{base}/a.gz" in str(error.value) and str(tmp_path / "a.gz") in str(error.value)


def test_offline_names_url_and_place(tmp_path):
    with server({}) as (base, _):
        pass  # now nobody listens there
    with pytest.raises(InputError) as error:
        data.load("beauty", cache_dir=tmp_path, mirror=base)
    assert f"{base}/reviews_Beauty_5.json.gz" in str(error.value)
    assert str(tmp_path / "amazon-2014" / "reviews_Beauty_5.json.gz") in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache-dir"):
        data.load("ml-100k", cache_dir=tmp_path / "file")


def test_two_processes_want_one_file(tmp_path):
    """Both get it whole, and it is downloaded once."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; print(len(data.fetch(sys.argv[1], sys.argv[2]).read_bytes()))"
    with server({"/a.gz": BIG}, delay=0.02) as (base, seen):
        both = [subprocess.Popen([sys.executable, "-c", code, f"{base}/a.gz", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                for _ in range(2)]
        assert [int(p.communicate(timeout=60)[0]) for p in both] == [len(BIG)] * 2
    assert len(seen) == 1


# --- the formats ----------------------------------------------------------------------------------------------------------

REVIEWS = [("A1", "B1", 5.0, 1_300_000_000), ("A1", "B2", 3.0, 1_200_000_000), ("A1", "B3", 4.0, 1_400_000_000),
           ("A2", "B3", 1.0, 1_350_000_000), ("A2", "B4", 2.0, 1_360_000_000)]
META = [
    """{'asin': 'B1', 'title': "L'Oreal Mask &amp; Cream", 'brand': 'L\\'Oreal', 'categories': [['Beauty', 'Hair Care', 'Masks'], ['Beauty', 'X']], 'price': 3.5,"""
    """ 'related': {'also_bought': ['B9', 'B2'], 'also_viewed': ['B3']}, 'salesRank': {'Beauty': 12}}""",
    """{'asin': 'B9', 'title': 'not in the 5-core'}""",
    """{'asin': 'B2', 'description': "he said 'related': {oops", 'title': 'Caf\\xe9 soap', 'categories': [['Beauty']]}""",
    """{'asin': 'B3', 'brand': 'OPI', 'categories': [['Beauty', 'Nails']]}""",
]


def gz(text):
    return gzip.compress(text.encode())


def files_2014(reviews=None, meta=None):
    reviews = reviews or [json.dumps({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t, "reviewText": "fine"}) for u, i, r, t in REVIEWS]
    return {"/reviews_Beauty_5.json.gz": gz("\n".join(reviews) + "\n"), "/meta_Beauty.json.gz": gz("\n".join(meta or META) + "\n")}


def test_amazon_2014(tmp_path, capsys):
    with server(files_2014()) as (base, seen):
        d = data.load("beauty", cache_dir=tmp_path, mirror=base)
        again = data.load("beauty", cache_dir=tmp_path, mirror=base)  # from the parsed cache
        assert len(seen) == 2
    assert "published are 22363 / 12101 / 198502" in capsys.readouterr().err
    assert list(d.items) == ["B1", "B2", "B3", "B4"]
    assert (d.items["B1"].title, d.items["B1"].attributes) == ("L'Oreal Mask & Cream", {"brand": ("L'Oreal",), "categories": ("Hair Care", "Masks")})
    assert (d.items["B2"].title, d.items["B2"].attributes) == ("Café soap", {"categories": ("Beauty",)})
    assert d.items["B3"].title == "untitled OPI Nails" and d.items["B4"].title == "untitled"
    assert d.sequences["A1"] == [("B2", 1.2e9, 3.0), ("B1", 1.3e9, 5.0), ("B3", 1.4e9, 4.0)] and d.has_clock
    assert d.splits == {"train": [("A2", 1)], "validation": [("A1", 1)], "test": [("A1", 2)]}  # leave-one-out
    for field in ("items", "sequences", "splits", "train_length", "has_clock", "users"):
        assert getattr(again, field) == getattr(d, field)
    assert all(again.items[i].attributes == d.items[i].attributes and again.items[i].title == d.items[i].title for i in d.items)


def files_2023(ratings=None, meta=None):
    ratings = ratings or ["user_id,parent_asin,rating,timestamp"] + [f"{u},{i},{r},{t}123" for u, i, r, t in REVIEWS]
    meta = meta or [json.dumps(x) for x in (
        {"parent_asin": "B1", "title": "Game One", "store": "Nintendo", "categories": ["Video Games", "PC", "Games"], "price": 9.5, "description": ["d"]},
        {"parent_asin": "B2", "title": None, "store": None, "categories": [], "price": None, "description": []},
        {"parent_asin": "B3", "title": "Game Three", "store": "Sega", "categories": ["Video Games"], "price": None, "description": ["d"]},
        {"parent_asin": "B4", "title": "Game Four", "store": "Sega", "categories": ["Video Games", "Mac"], "price": 2, "description": ["d"]})]
    return {"/Video_Games.csv.gz": gz("\n".join(ratings) + "\n"), "/meta_Video_Games.jsonl.gz": gz("\n".join(meta) + "\n")}


def test_amazon_2023(tmp_path):
    with server(files_2023()) as (base, _):
        load = lambda **options: data.load("amazon2023:Video_Games", cache_dir=tmp_path, mirror=base, **options)
        d = load()
        assert d.items["B1"].attributes == {"brand": ("Nintendo",), "categories": ("PC", "Games")} and d.items["B2"].title == "untitled"
        assert d.sequences["A1"][0] == ("B2", 1_200_000_000.123, 3.0)
        assert d.splits == {"train": [("A1", 1), ("A2", 1)], "validation": [], "test": [("A1", 2)]}  # temporal
        assert list(load(require=["title", "price"]).items) == ["B1", "B4"]
        assert list(load(require=["description"]).sequences["A1"]) == [("B1", 1_300_000_000.123, 5.0), ("B3", 1_400_000_000.123, 4.0)]
        window = load(since="2011-01-01", until="2013-02-01")  # 1.3e9 is in March 2011, 1.36e9 is 2013-02-04
        assert {u: [x.item_id for x in s] for u, s in window.sequences.items()} == {"A1": ["B1"], "A2": ["B3"]}
        assert list(window.items) == ["B1", "B3"]


def test_core_and_window_that_leave_nothing(tmp_path):
    with server(files_2023()) as (base, _):
        for options in ({"core": 2}, {"since": "2030-01-01"}):
            with pytest.raises(InputError, match="leave no interaction"):
                data.load("amazon2023:Video_Games", cache_dir=tmp_path, mirror=base, **options)
        with pytest.raises(InputError, match="2021-06-30"):
            data.load("amazon2023:Video_Games", cache_dir=tmp_path, mirror=base, since="yesterday")
        with pytest.raises(InputError, match="no item"):
            data.load("amazon2023:Video_Games", cache_dir=tmp_path, mirror=base, require=["nothing"])
    with pytest.raises(InputError, match="amazon2023:Video_Games"):
        data.load("amazon2023:../../etc", cache_dir=tmp_path)


def test_core_is_a_fixed_point():
    rows = {"a": "xyz", "b": "xyz", "c": "xw", "d": "wv"}
    raw = data.Raw({i: data.make_item(i, i, {}) for i in "xyzwv"}, {u: [data.Interaction(i) for i in s] for u, s in rows.items()}, False, {})
    left = data.restrict("r", raw, None, None, 2)  # v goes, so d goes, so w goes, so c goes
    assert {u: "".join(x.item_id for x in s) for u, s in left.sequences.items()} == {"a": "xyz", "b": "xyz"} and list(left.items) == list("xyz")


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in files.items():
            z.writestr(name, text.encode("latin-1"))
    return out.getvalue()


ML_100K = {"ml-100k/u.data": "1\t2\t5\t881250949\n1\t1\t3\t881250000\n2\t1\t4\t891717742\n",
           "ml-100k/u.item": "1|Café (1995)|01-Jan-1995||http://x|" + "|".join("0101" + "0" * 15) + "\n"
                             "2|unknown||||" + "|".join("1" + "0" * 18) + "\n",
           "ml-100k/u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n"}
ML_1M = {"ml-1m/ratings.dat": "1::2::5::978300760\n1::1::3::978302109\n", "ml-1m/movies.dat": "1::Toy Story (1995)::Animation|Comedy\n2::Heat: Part::1 (1995)::Action\n",
         "ml-1m/users.dat": "1::F::1::10::48067\n"}


def test_movielens(tmp_path):
    ML = {**ML_1M, "ml-1m/movies.dat": ML_1M["ml-1m/movies.dat"].replace("Part::1", "Part 1")}
    with server({"/ml-100k.zip": zipped(ML_100K), "/ml-1m.zip": zipped(ML)}) as (base, _):
        small, large = (data.load(name, cache_dir=tmp_path, mirror=base) for name in ("ml-100k", "ml-1m"))
    assert small.items["1"].title == "Café (1995)" and small.items["1"].attributes == {"genre": ("Action", "Animation")}
    assert small.items["2"].attributes == {} and small.has_clock
    assert small.sequences["1"] == [("1", 881250000.0, 3.0), ("2", 881250949.0, 5.0)]
    assert small.users["1"] == {"age": "24", "gender": "M", "occupation": "technician", "zip_code": "85711"}
    assert large.items["1"].attributes == {"genre": ("Animation", "Comedy")}
    assert large.users["1"] == {"age": "under 18", "gender": "F", "occupation": "K-12 student", "zip_code": "48067"}
    assert [x.item_id for x in large.sequences["1"]] == ["2", "1"]


@pytest.mark.parametrize("name, files, words", [
    ("beauty", lambda: files_2014(reviews=['{"reviewerID": "A", "asin": "B1", "overall": 5, "unixReviewTime": 1}', "{broken"]),
     ["reviews_Beauty_5.json.gz line 2", "reviewerID, asin, overall, unixReviewTime"]),
    ("beauty", lambda: files_2014(reviews=['{"reviewerID": "A", "asin": "B1", "overall": NaN, "unixReviewTime": 1}']), ["line 1", "finite"]),
    ("beauty", lambda: files_2014(reviews=['{"reviewerID": "A", "asin": ["B1"], "overall": 5, "unixReviewTime": 1}']), ["line 1", "is not an id"]),
    ("beauty", lambda: files_2014(meta=META + ["{'asin': 'B4', 'title': __import__('os').system('true')}"]), ["meta_Beauty.json.gz line 5", "Python literal"]),
    ("beauty", lambda: files_2014(meta=META + ["(" * 100_000]), ["meta_Beauty.json.gz line 5"]),
    ("amazon2023:Video_Games", lambda: files_2023(ratings=["user_id,parent_asin,rating,timestamp", "A,B,5"]), ["Video_Games.csv.gz line 2", "user_id,parent_asin"]),
    ("amazon2023:Video_Games", lambda: files_2023(ratings=["user,item", "A,B"]), ["line 1", "header user_id,parent_asin,rating,timestamp"]),
    ("ml-100k", lambda: {"/ml-100k.zip": zipped(ML_100K | {"ml-100k/u.data": "1\t2\t5\n"})}, ["u.data line 1", "expected 4 fields"]),
    ("ml-100k", lambda: {"/ml-100k.zip": zipped(ML_100K | {"ml-100k/u.data": "1\t7\t5\t1\n"})}, ["u.data line 1", "'7' is not in u.item"]),
    ("ml-1m", lambda: {"/ml-1m.zip": zipped(ML_1M)}, ["movies.dat line 2", "expected 3 fields"]),
    ("ml-1m", lambda: {"/ml-1m.zip": zipped({"x": ""})}, ["ml-1m/", "cannot be read"]),
])
def test_broken_lines_are_named(tmp_path, name, files, words):
    with server(files()) as (base, _):
        with pytest.raises(InputError) as error:
            data.load(name, cache_dir=tmp_path, mirror=base)
    assert all(w in str(error.value) for w in words), error.value


def test_skip_bad_lines_counts_and_reports(tmp_path, capsys):
    good = [json.dumps({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t}) for u, i, r, t in REVIEWS]
    with server(files_2014(good[:2] + ["{broken", "x" * (data.MAX_LINE + 10)] + good[2:], META + ["nonsense"])) as (base, _):
        d = data.load("beauty", cache_dir=tmp_path, mirror=base, skip_bad_lines=True)
        said = capsys.readouterr().err
        data.load("beauty", cache_dir=tmp_path, mirror=base, skip_bad_lines=True)  # from the parsed cache: reported all the same
        assert [line for line in capsys.readouterr().err.splitlines() if "skipped" in line] == [line for line in said.splitlines() if "skipped" in line]
    assert "skipped 2 bad lines of" in said and "line 3" in said and "skipped 1 bad line of" in said
    assert sum(map(len, d.sequences.values())) == len(REVIEWS) and d.items["B1"].title.startswith("L'Oreal")


def test_a_damaged_file_put_there_by_hand_is_named(tmp_path):
    (tmp_path / "movielens").mkdir()
    (tmp_path / "movielens" / "ml-100k.zip").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="ml-100k.zip.*cannot be read"):
        data.load("ml-100k", cache_dir=tmp_path)
    (tmp_path / "amazon-2014").mkdir()
    for name, body in files_2014().items():
        (tmp_path / "amazon-2014" / name[1:]).write_bytes(body[:-9])
    with pytest.raises(InputError, match="reviews_Beauty_5.json.gz: cannot be read"):
        data.load("beauty", cache_dir=tmp_path)


def test_the_parsed_cache_follows_its_files(tmp_path):
    (tmp_path / "amazon-2014").mkdir()
    put = lambda files: [(tmp_path / "amazon-2014" / name[1:]).write_bytes(body) for name, body in files.items()]
    put(files_2014())
    assert len(data.load("beauty", cache_dir=tmp_path).items) == 4
    (parsed,) = (tmp_path / "parsed").iterdir()
    stored = json.loads(parsed.read_text())
    stored["items"][0][1] = "from the cache"
    parsed.write_text(json.dumps(stored))
    assert data.load("beauty", cache_dir=tmp_path).items["B1"].title == "from the cache"
    parsed.write_text("{broken")
    assert data.load("beauty", cache_dir=tmp_path).items["B1"].title.startswith("L'Oreal")
    put(files_2014(reviews=[json.dumps({"reviewerID": "A", "asin": "B1", "overall": 1, "unixReviewTime": 1})]))
    assert list(data.load("beauty", cache_dir=tmp_path).items) == ["B1"]


def test_odd_metadata_counts_as_missing(tmp_path):
    odd = ["{'asin': 'B1', 'title': 3, 'brand': ['x'], 'categories': 'Beauty'}", "{'asin': 'B2', 'title': 'T', 'categories': {'a': 1}}",
           "{'asin': 'B3', 'title': 'U', 'categories': [['Beauty', None, 'Nails']]}"]
    with server(files_2014(meta=odd)) as (base, _):
        items = data.load("beauty", cache_dir=tmp_path, mirror=base).items
    assert [items[i].attributes for i in ("B1", "B2", "B3")] == [{}, {}, {"categories": ("Nails",)}] and items["B1"].title == "untitled"


def test_the_very_same_row_twice_is_one(tmp_path):
    good = [json.dumps({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t}) for u, i, r, t in REVIEWS + REVIEWS[:2]]
    with server(files_2014(reviews=good)) as (base, _):
        assert sum(map(len, data.load("beauty", cache_dir=tmp_path, mirror=base).sequences.values())) == len(REVIEWS)
