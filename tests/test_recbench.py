"""RecBench+'s files in the published schema: queries, candidates, splits, and files of answers."""

import itertools
import json
import math
import os
import random
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace

import pytest

import extras.recbench as recbench
from data import InputError, title_key
from extras.flags import load_data, parse_eval_flags
from extras.recbench import RecBench, RecBenchQueries, open_ended, read_responses

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "recbench_plus"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no RecBench+ data at {SHARED}; set SHARED_DATA")
MOVIES = """1::Toy Story (1995)::Animation|Children's|Comedy
17::Sense and Sensibility (1995)::Drama|Romance
73::Mis\ufffdrables, Les (1995)::Drama|Musical
256::Junior (1994)::Comedy|Sci-Fi
356::Forrest Gump (1994)::Comedy|Romance|War
515::Remains of the Day, The (1993)::Drama
1320::Alien\ufffd (1992)::Action|Horror
2028::Saving Private Ryan (1998)::Action|Drama|War
3045::Peter's Friends (1992)::Comedy|Drama
""" + "".join(f"{n}::Filler {n} (1990)::Western\n" for n in range(5000, 5030))

def record(**changes):
    return {"source_user": "2326", "condition_num": 2, "movieSubsetId": [356, 2028], "data_idx": 3862,
            "movieSubset": ["Forrest Gump (1994)", "Saving Private Ryan (1998)"],
            "sharedRelationships": [["Starring", "Tom Hanks"], ["Genre", "War"]],
            "situational_description_query": "A war film\nwith Tom Hanks, please."} | changes

def implicit():
    clue = {"movie": "The_Remains of the Day (1993)", "relation": "Starring", "person": "Emma Thompson"}
    unknown = clue | {"movie": "Another Country (1984)"}
    return record(source_user="4411", condition_num=1, movieSubsetId=[256, 3045],
                  movieSubset=["Junior (1994)", "Peter's Friends (1992)"], multihop_info=[clue, unknown],
                  sharedRelationships=[["Starring", "Emma Thompson"]], data_idx=1)

def profile(*subsets, **changes):
    children = [{"query": "What next?", "movie subset": subset} if subset else {} for subset in subsets]
    return {"query & ground true": children} | changes

def book(**changes):
    return {"source_user": "A1", "condition_num": 1, "bookSubset": ["Emma", "EMMA."], "data_idx": 7,
            "sharedRelationships": [["WRITTEN_BY", "Jane Austen"]],
            "situational_description_query": "Austen?"} | changes

@pytest.fixture
def write(tmp_path):
    """Writes query files by kind (Explicit=[records]) and others by name (ratings=text); gives the folder."""
    def write(domain="movie", **files):
        folder = tmp_path / "dataset" / domain
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (files if domain == "book" else {"movies": MOVIES} | files).items():
            path = folder / (f"{name}Query.json" if name[0].isupper() else f"{name}.dat")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path
    return write

def lists_of(bench, num_candidates=20, seed=0):
    """All queries of the files with their candidates."""
    source = RecBenchQueries(bench, None, num_candidates, seed)
    return [q for split in source.splits if source.splits[split] for q in source.draw(split, 9999)]

def test_an_explicit_record(write):
    bench = RecBench(write(Explicit=[record()]), "movie")
    [query] = bench.queries
    assert (query.id, query.kind, query.num_conditions) == ("movie-explicit-3862", "explicit", 2)
    assert query.user == "2326" and query.text == "A war film with Tom Hanks, please."
    assert (query.truths, query.candidates, query.history) == (("356", "2028"), [], [])
    assert query.titles == ("Forrest Gump (1994)", "Saving Private Ryan (1998)")
    assert query.conditions == (("starring", "Tom Hanks"), ("genre", "War"))
    assert bench.items["1"].attributes == {"genre": ("Animation", "Children's", "Comedy")}
    books = RecBench(write("book", Explicit=[book(), book(bookSubset=["戦争", "平和"])]), "book")
    assert list(books.items) == ["Emma", "戦争", "平和"]  # no catalogue: what records name
    assert [q.truths for q in books.queries] == [("Emma",), ("戦争", "平和")]

def test_what_queries_say_about_items_is_for_the_graph_and_not_shown(write):
    wrong = {"movie": "Toy Story (1995)", "relation": "Starring", "person": "P.",
             "original person": "Tom Hanks"}
    misinformed = record(query="Like Toy Story with P.", misinformed=[wrong])
    bench = RecBench(write(Explicit=[record()], Implicit=[implicit()], Misinformed=[misinformed]), "movie")
    known = {x.id: x.attributes for x in bench.graph_items()}
    assert known["356"] == {"genre": ("Comedy", "Romance", "War"), "starring": ("Tom Hanks",)}
    assert known["515"]["starring"] == ("Emma Thompson",)  # a clue, spelt The_Remains of the Day
    assert known["1"]["starring"] == ("Tom Hanks",)  # not the wrong one
    for query in lists_of(bench, 8):
        assert all(set(x.attributes) <= {"genre"} for x in [*query.candidates, *query.history])

def test_records_of_several_queries(write):
    titles = ["Les Misérables (1995)", "The Remains of the Day (1993)", "No Such Film (1990)"]
    bench = RecBench(write(DemographicsBased=[profile(None, titles, titles[2:], data_idx=4)]), "movie")
    [query] = bench.queries
    assert (query.id, query.kind, query.num_conditions) == ("movie-demographics-4-0", "demographics", 0)
    assert query.truths == ("73", "515")  # the catalogue's, but for the article and lost characters
    assert len(query.titles) == 3  # open-ended answers are scored against all
    assert list(bench.left_out) == ["movie-demographics-4-1"]

@pytest.mark.parametrize("predecessors", [
    {"predecessor_movie_count": {"Toy Story (1995)": 1, "Junior (1994)": 5, "Alien (1992)": 9}},
    {"predecessor_seq_count": {"Toy Story (1995) -> Junior (1994)": 2, "Toy Story (1995), Alien (1992)": 1}},
])
def test_interest_histories_are_what_came_before_and_never_the_pool_of_answers(write, predecessors):
    shared = ["Alien (1992)", "Forrest Gump (1994)", "Peter's Friends (1992)"]
    interest = profile(shared[:1], ["Forrest Gump (1994)"], **predecessors)
    interest["Shared consecutive movies"] = shared
    bench = RecBench(write(InterestBased=[interest]), "movie")
    for query in [q for seed in range(20) for q in lists_of(bench, seed=seed)]:
        assert [h.id for h in query.history] == ["1", "256"]  # the most frequent last
        assert {c.id for c in query.candidates} & {"1", "256", "1320", "356", "3045"} == set(query.truths)

def test_ids_go_before_misencoded_titles_and_titles_stand_in_for_unknown_ids(write):
    forms = [("A?????? (1992)", 1320), ("Alienï¿½ (1992)", 99999)]
    records = [record(movieSubset=[title], movieSubsetId=[i], data_idx=0) for title, i in forms]
    folder = write(Explicit="\ufeff" + json.dumps(records))
    latin = "60::Who::What (1999)::Comedy\r\n63::Café (2002)\n".encode("latin-1")
    (folder / "dataset/movie/movies.dat").write_bytes(MOVIES.encode() + latin)
    bench = RecBench(folder, "movie")
    assert [q.truths for q in bench.queries] == [("1320",), ("1320",)]
    assert [q.id for q in bench.queries] == ["movie-explicit-0", "movie-explicit-0+"]  # a repeated id
    titles = ["Who::What (1999)", "Café (2002)", "Alien (1992)"]  # without the lost character
    assert [bench.items[i].title for i in ("60", "63", "1320")] == titles

def test_candidates(write):
    bench = RecBench(write(Explicit=[record()], Implicit=[implicit()]), "movie")
    lists = [q for seed in range(200) for q in lists_of(bench, 8, seed)]
    truths = {q.id: q.truths for q in bench.queries}
    for query in lists:
        ids = [c.id for c in query.candidates]
        assert len(set(ids)) == 8 and len(query.truths) == 1
        assert [t for t in truths[query.id] if t in ids] == list(query.truths)
    assert {q.truths[0] for q in lists if q.kind == "explicit"} == {"356", "2028"}  # each takes its turn
    # Emma Thompson stars in 515, so for the implicit query it is right too.
    assert {q.kind for q in lists if "515" in {c.id for c in q.candidates}} == {"explicit"}
    assert {[c.id for c in q.candidates].index(q.truths[0]) for q in lists} == set(range(8))

def test_two_candidates_never_share_a_title(write):
    """Nor titles that differ in case alone: an answer would name both."""
    catalogue = "".join(f"{n}::{t}\n" for n, t in enumerate(["Emma", "EMMA", "Dune", "dune"] * 9 + ["It"]))
    bench = RecBench(write("book", Explicit=[book(bookSubset=["Emma"])], books=catalogue), "book")
    for seed in range(20):
        [query] = lists_of(bench, 3, seed)
        assert sorted(c.title.lower() for c in query.candidates) == ["dune", "emma", "it"]
    with pytest.raises(InputError, match="only 2 wrong titles"):
        lists_of(bench, 4)

@pytest.mark.parametrize("files, message", [
    ({"Explicit": "[{"}, "ExplicitQuery.json record 0: expected JSON"),
    ({"Explicit": [record(movieSubset="Heat (1995)", movieSubsetId=None)]}, "record 0.*Heat"),
    ({"Implicit": [record(multihop_info=["x"])]}, "ImplicitQuery.json record 0"),
    ({"DemographicsBased": [{"query & ground true": [{"query": "q"}]}]}, "record 0.*movie subset"),
    ({"Explicit": [record()], "movies": "1::A (1995)\nnonsense\n"}, "movies.dat line 2: expected id::"),
    ({}, "no query file.*github.com/jiani-huang/RecBench"),
])
def test_broken_files_are_named_with_the_place(write, files, message):
    with pytest.raises(InputError, match=rf"\A.*{message}.*\Z"):  # in one line
        RecBench(write(**files), "movie")

def test_splits_keep_users_together_and_drawing_goes_round_with_other_negatives(write):
    records = [record(source_user=str(n // 2), data_idx=n) for n in range(1000)]
    source = RecBenchQueries(RecBench(write(Explicit=records), "movie"), seed=3)
    assert [len(s) / 1000 for s in source.splits.values()] == pytest.approx([0.8, 0.1, 0.1], abs=0.04)
    assert sum(len({q.user for q in s}) for s in source.splits.values()) == 500
    first, again = source.draw("test", 999), source.draw("test", 999, start=1)
    candidates = {q.id: q.candidates for q in first}
    assert len(first) == len(source.splits["test"]) == len(candidates)
    assert len(again) == 999 and {q.id for q in again} == set(candidates)
    assert all(q.candidates != candidates[q.id] for q in again)
    with pytest.raises(InputError, match="hold explicit queries alone"):
        RecBenchQueries(source.bench, ["explicit", "implicit"])

@real
def test_real_files():
    bench, books = RecBench(SHARED, "movie"), RecBench(SHARED, "book")
    assert len(bench.items) == len({title_key(item.title) for item in bench.items.values()}) == 3883
    kinds = Counter(q.kind for q in bench.queries)
    assert kinds == {"explicit": 35, "implicit": 11, "misinformed": 11, "demographics": 279}
    # of 848 demographics titles two are not the catalogue's: one lost its article, one is an original title
    assert not bench.left_out and sum(len(q.titles) - len(q.truths) for q in bench.queries) == 2
    assert all(len({c.title for c in q.candidates}) == 20 for q in lists_of(bench))
    assert len(books.queries) == 14 and all(len(q.truths) == len(q.titles) for q in books.queries)

@pytest.fixture
def bench(write):
    """Ids 3862, 1 and 1 (of two kinds), 2-0 and 2-1, which is left out."""
    people = [profile(["Junior (1994)"], ["No Such Film (1990)"], data_idx=2)]
    folder = write(Explicit=[record(), record(data_idx=1)], Implicit=[implicit()], DemographicsBased=people)
    return RecBench(folder, "movie")

def answers(path, *records):
    path.write_text("\ufeff" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records) + "\n")
    return path

def test_answers_are_found_by_full_id_short_id_or_kind(bench, tmp_path):
    records = [{"id": 3862, "response": "a\u2028b"}, {"id": "movie-explicit-1", "response": ""},
               {"id": "1", "kind": "implicit", "response": "c"}, {"id": "2-0", "response": "d"}]
    path = answers(tmp_path / "a.jsonl", *records)
    assert [(q.id, text) for q, text in read_responses(path, bench)] == [
        ("movie-explicit-3862", "a\u2028b"), ("movie-explicit-1", ""), ("movie-implicit-1", "c"),
        ("movie-demographics-2-0", "d")]

@pytest.mark.parametrize("records, message", [
    ([{"id": "99", "response": "x"}], "line 1: id '99': it is of no query"),
    ([{"id": "1", "response": "x"}], "is of movie-explicit-1, movie-implicit-1; add \"kind\""),
    ([{"id": i, "response": "x"} for i in (3862, "movie-explicit-3862")], "line 2.*answered on line 1"),
    ([{"id": "2-1", "response": "x"}], "not in the catalogue: No Such Film"),
    ([{"id": "3862"}], "line 1: expected {\"id\", \"response\": text}, found"),
])
def test_answers_that_cannot_be_counted_are_refused(bench, tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        read_responses(answers(tmp_path / "a.jsonl", *records), bench)

def test_the_report_is_of_the_answered_and_says_how_many_these_are(bench, tmp_path):
    dataset, out = SimpleNamespace(name="recbench-movie", bench=bench), tmp_path / "eval.json"
    response = "'Saving Private Ryan' [SEP] Forrest Gump"
    path = answers(tmp_path / "a.jsonl", {"id": "3862", "response": response})
    recbench.evaluate_open_ended(dataset, path, out)
    flags = f"--data recbench:movie --data-dir {tmp_path} --open-ended {path} --num-candidates 999"
    assert load_data(parse_eval_flags(flags.split())).bench  # no lists are built, so no matter how many
    report = json.loads(out.read_text())
    assert (report["answered"], report["of"]) == (1, 2)
    for match in ("recbench", "exact"):
        want = open_ended(response, bench.queries[0].titles, match)
        assert report[match]["queries"]["movie-explicit-3862"] == want
        assert report[match]["recall"]["mean"] == want["recall"]

@real
def test_reproduces_the_published_scores_of_279_queries():
    groups = json.loads((SHARED / "dataset/movie/DemographicsBasedQuery.json").read_text())
    lines = (SHARED / "regression/gpt-4o-predictions.jsonl").read_text().splitlines()
    expected = json.loads((SHARED / "regression/gpt-4o-expected.json").read_text())
    for line, row in zip(map(json.loads, lines), expected, strict=True):
        assert line["id"] == row["id"]
        group, query = map(int, line["id"].split("-"))
        got = open_ended(line["response"], groups[group]["query & ground true"][query]["movie subset"])
        assert (got["precision"], got["recall"], got["ftr"]) == (row["precision"], row["recall"], row["ftr"])
        assert got["ndcg"] == pytest.approx(row["ndcg"], abs=1e-12)

def scores(response, truths, match="recbench", domain="movie"):
    got = open_ended(response, truths, match, domain)
    return got["precision"], got["recall"], got["ndcg"], got["ftr"]

def test_by_hand():
    truths = ["The Usual Suspects (1995)", "Pulp Fiction (1994)", "Reservoir Dogs (1992)"]
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    # "The Usual Suspects" 36/43 and "Reservoir Dogs" 28/35 hit, "Pulp Fiction" 24/31 = 0.77 misses.
    response = "Memento [SEP] The Usual Suspects [SEP] Pulp Fiction [SEP] Reservoir Dogs"
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    assert scores(response, truths) == (2 / 4, 2 / 3, pytest.approx(dcg / ideal), False)
    dcg = 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert scores(response, truths, "exact") == (3 / 4, 1, pytest.approx(dcg / ideal), False)
    twice = "The Usual Suspects [SEP] The Usual Suspects"  # only the benchmark's NDCG counts the repeat
    assert scores(twice, truths[:1]) == (1 / 2, 1, pytest.approx(1 + 1 / math.log2(3)), False)
    assert scores(twice, truths[:1], "exact")[2] == 1
    assert scores("Jaws, 1975", truths + ["Jaws, 1975"])[3]  # the format of a list is not followed

@pytest.mark.parametrize("domain", ["movie", "book"])
def test_the_rule_by_the_benchmarks_definition(domain):
    """With nothing but `ratio`, on random words of few letters, where many are near 0.8."""
    rng, num_hits = random.Random(0), 0
    for _ in range(2000):
        words = ["".join(rng.choices("abSu ", k=rng.randint(1, 9))).strip() or "a" for _ in range(4)]
        response, listed, truths = " [SEP] ".join(words[:3]), words[:3], words[2:]
        if domain == "book":
            listed = response.strip().strip("Recommended books (separated by [SEP]):").split("[SEP]")
        hits = [next((t for t in truths if SequenceMatcher(None, p, t).ratio() >= 0.8), None) for p in listed]
        found = sum(t in hits for t in truths)
        num_hits += found
        assert scores(response, truths, domain=domain)[:2] == (found / len(listed), found / len(truths))
    assert 100 < num_hits < 3900

def test_exact_spellings_and_nothing():
    truth = ["Godfather, The (1972)"]
    hits = "the godfather (1972)", "Godfather, The", "“The Godfather (1972)”.", "[**The Godfather**]"
    assert [scores(hit, truth, "exact")[1] for hit in hits] == [1] * 4
    for miss in ("The Godfather (1990)", "Godfather", "The Godfather: Part II", "the"):
        assert scores(miss, truth, "exact")[1] == 0, miss
    assert scores("King Kong", ["King Kong (1933)", "King Kong (1976)"], "exact")[:2] == (1, 1 / 2)
    for match, truths in itertools.product(("recbench", "exact"), (truth, ["", " ", "''"], [])):
        for response in ("", " [SEP] [SEP]\n", "'' [SEP] \"\"", "(1994) [SEP] ()"):
            assert scores(response, truths, match)[:3] == (0, 0, 0)
