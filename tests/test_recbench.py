"""RecBench+: open-ended metrics against the benchmark's published scores and by hand; its files, in the official schema."""

import json
import math
import os
import random
import time
from difflib import SequenceMatcher
from pathlib import Path

import pytest

import data
from data import InputError, load_recbench, recbench_queries, split_queries, title_key
from rewards import open_ended
from test_train import run

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "recbench_plus"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no RecBench+ data at {DATA}; set SHARED_DATA to its parent")


# --- open-ended metrics -------------------------------------------------------------------------------------------------


@real
def test_reproduces_the_published_scores_of_279_queries():
    groups = json.loads((DATA / "dataset/movie/DemographicsBasedQuery.json").read_text())
    lines = (DATA / "regression/gpt-4o-predictions.jsonl").read_text().splitlines()
    expected = json.loads((DATA / "regression/gpt-4o-expected.json").read_text())
    assert len(lines) == len(expected) == 279
    for line, row in zip(map(json.loads, lines), expected):
        assert line["id"] == row["id"]
        group, query = map(int, line["id"].split("-"))
        truths = groups[group]["query & ground true"][query]["movie subset"]
        got = open_ended(line["response"], truths)
        assert (got["precision"], got["recall"], got["ftr"]) == (row["precision"], row["recall"], row["ftr"]), line["id"]
        assert got["ndcg"] == pytest.approx(row["ndcg"], abs=1e-12), line["id"]


def scores(response, truths, match="recbench"):
    got = open_ended(response, truths, match)
    return got["precision"], got["recall"], got["ndcg"], got["ftr"]


def test_by_hand():
    truths = ["The Usual Suspects (1995)", "Pulp Fiction (1994)", "Reservoir Dogs (1992)"]
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    # "The Usual Suspects" 36/43 = 0.84 hits, "Pulp Fiction" 24/31 = 0.77 misses, "Reservoir Dogs" 28/35 = 0.8 hits
    response = "Memento [SEP] The Usual Suspects [SEP] Pulp Fiction [SEP] Reservoir Dogs"
    assert scores(response, truths) == (2 / 4, 2 / 3, pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal), False)
    dcg = 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert scores(response, truths, "exact") == (3 / 4, 1, pytest.approx(dcg / ideal), False)


def test_recbench_drops_the_year_of_a_prediction_and_keeps_that_of_a_truth():
    assert scores("Pulp Fiction (1994) [SEP] x", ["Pulp Fiction (1994)"])[1] == 0  # without the year too short
    assert scores("Pulp Fiction, 1994 [SEP] x", ["Pulp Fiction (1994)"])[1] == 1
    assert scores("The Usual Suspects (2020) [SEP] x", ["The Usual Suspects (1995)"])[1] == 1  # any year does
    assert scores("THE USUAL SUSPECTS [SEP] x", ["The Usual Suspects (1995)"])[1] == 0  # case matters


def test_recbench_quotes():
    truths = ["Jaws 1975"]
    for hit in ("Jaws 197", "'Jaws 197'", '"Jaws 197"', "'\"Jaws 197\"'", ' "Jaws 197 (1994)" '):
        assert scores(f"{hit} [SEP] x", truths)[1] == 1
    # ' goes before ": the inner ' stay, and 8 of 8 + 9 + 2 * 6 characters are no match
    assert scores("\"''''''Jaws 197''''''\" [SEP] x", truths)[1] == 0


def test_repeats():
    truths = ["The Usual Suspects (1995)", "Reservoir Dogs (1992)"]
    response = "The Usual Suspects [SEP] The Usual Suspects"
    assert scores(response, truths) == (1 / 2, 1 / 2, pytest.approx(1), False)  # NDCG counts the repeat, the others do not
    assert scores(response, truths, "exact") == (1 / 2, 1 / 2, pytest.approx(1 / (1 + 1 / math.log2(3))), False)
    assert scores(response, truths[:1])[2] == pytest.approx(1 + 1 / math.log2(3))  # and can exceed 1


def test_recbench_takes_the_first_truth_that_is_near_enough_not_the_nearest():
    truths = ["The Godfather: Part I", "The Godfather: Part II"]
    assert scores("The Godfather: Part II [SEP] x", truths)[:2] == (1 / 2, 1 / 2)
    assert scores("The Godfather: Part II [SEP] The Godfather: Part I", truths)[:2] == (1 / 2, 1 / 2)  # both go to Part I
    assert scores("The Godfather: Part II [SEP] The Godfather: Part I", truths, "exact")[:2] == (1, 1)


def test_no_separator():
    truths = ["Casablanca (1942)"]
    assert scores("Casablanca, 1942", truths) == (1, 1, 1, True)  # the benchmark marks it, and scores it all the same
    assert scores("Casablanca", truths, "exact") == (1, 1, 1, False)
    assert scores("I am sorry, but " + "no " * 200, truths, "exact") == (0, 0, 0, True)


@pytest.mark.parametrize("match", ["recbench", "exact"])
@pytest.mark.parametrize("response", ["", " ", "[SEP]", " [SEP] [SEP]\n", "'' [SEP] \"\"", "(1994) [SEP] (1994)", "[] [SEP] ()"])
def test_nothing_never_matches(response, match):
    for truths in (["Casablanca (1942)"], ["", " ", "''"], []):
        got = open_ended(response, truths, match)
        assert (got["precision"], got["recall"], got["ndcg"]) == (0, 0, 0)


def test_empty_predictions_count_for_the_benchmark_only():
    assert scores("The Usual Suspects [SEP]  [SEP]", ["The Usual Suspects (1995)"])[0] == 1 / 3
    assert scores("[SEP] The Usual Suspects [SEP]", ["The Usual Suspects (1995)"], "exact") == (1, 1, 1, False)
    assert open_ended("[SEP]", ["Casablanca (1942)"], "exact")["ftr"] and not open_ended("[SEP]", ["Casablanca (1942)"])["ftr"]


def test_exact_spellings():
    truth = ["Godfather, The (1972)"]
    for hit in ("The Godfather", "the godfather (1972)", "Godfather, The", '"The  Godfather" (1972)', "“The Godfather (1972)”.",
                "**The Godfather**", "[The Godfather (1972)]", "(The Godfather (1972))", "(The Godfather)", "Ｔｈｅ Godfather",
                "The_Godfather [1972]"):
        assert scores(hit, truth, "exact")[1] == 1, hit
    for miss in ("The Godfather (1990)", "Godfather", "The Godfather: Part II", "The Godfather 1972", "T", "the"):
        assert scores(miss, truth, "exact")[1] == 0, miss
    assert scores("One Flew Over the Cuckoo’s Nest", ["One Flew Over the Cuckoo's Nest (1975)"], "exact")[1] == 1
    assert scores("L'Enfer", ["Enfer, L' (1994)"], "exact")[1] == 1
    assert scores("The Boat (Das Boot)", ["Boat, The (Das Boot) (1981)"], "exact")[1] == 1
    assert scores("The ABC Murders (1936)", ["THE ABC MURDERS."], "exact")[1] == 1  # a truth without a year cannot disagree


def test_exact_years_tell_remakes_apart():
    kongs = ["King Kong (1933)", "King Kong (1976)"]
    assert scores("King Kong", kongs, "exact")[:2] == (1, 1 / 2)
    assert scores("King Kong [SEP] King Kong", kongs, "exact")[:2] == (1 / 2, 1 / 2)
    assert scores("King Kong [SEP] King Kong (1933)", kongs, "exact")[:2] == (1, 1)  # the first then means the other one
    assert scores("King Kong (1976) [SEP] King Kong (2005)", kongs, "exact")[:2] == (1 / 2, 1 / 2)
    # one truth named twice is hit at its first rank
    assert scores("King Kong [SEP] King Kong (1933)", kongs[:1], "exact") == (1 / 2, 1, 1, False)


def test_quick_ratios_change_no_result():
    """The rule with nothing but `ratio`, on random words over few letters, where many are near 0.8."""
    rng = random.Random(0)
    word = lambda: "".join(rng.choices("ab ", k=rng.randint(1, 12))).strip() or "a"
    hits = 0
    for _ in range(2000):
        prediction, truths = word(), [word(), word()]
        hit = next((t for t in truths if SequenceMatcher(None, prediction, t).ratio() >= 0.8), None)
        hits += hit is not None
        assert scores(prediction, truths)[1] == sum(t == hit for t in truths) / 2
    assert 100 < hits < 1900


@pytest.mark.parametrize("match", ["recbench", "exact"])
def test_hostile_responses_take_less_than_a_second(match):
    truths = [f"The Breakfast Club and Friends of Mine {n} (1985)" for n in range(10)]
    rng = random.Random(0)
    anagrams = "[SEP]".join("".join(rng.sample(truths[0], len(truths[0]))) for _ in range(20000))
    for response in ("[SEP]" * 10**5, "x[SEP]" * 10**5, "a" * 10**6, " " * 10**6, "(1994)" * 170_000, "(" * 10**6,
                     "'\"" * 500_000, "ﷺ" * 10**6, ", the" * 200_000, "[SEP]".join([", the" * 58] * 20000), anagrams):
        start = time.perf_counter()
        open_ended(response, truths, match)
        assert time.perf_counter() - start < 1, response[:20]


@pytest.mark.parametrize("match", ["recbench", "exact"])
def test_padding_a_list_costs_precision_beyond_what_is_compared(match):
    truths = ["The Usual Suspects (1995)"]
    assert scores("[SEP]".join(["The Usual Suspects"] + ["x"] * 9999), truths, match)[:2] == (1 / 10_000, 1)
    assert scores("[SEP]".join(["x"] * 9999 + ["The Usual Suspects"]), truths, match)[:2] == (0, 0)


def test_wrong_types_are_errors():
    for response, truths in (("x", "Casablanca (1942)"), (None, ["x"]), (["x"], ["x"])):
        with pytest.raises(TypeError):
            open_ended(response, truths)
    with pytest.raises(ValueError):
        open_ended("x", ["x"], "fuzzy")


# --- files ----------------------------------------------------------------------------------------------------------------

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
    return {"source_user": "2326", "condition_num": 2, "movieCount": 2, "movieSubsetId": [356, 2028],
            "movieSubset": ["Forrest Gump (1994)", "Saving Private Ryan (1998)"],
            "sharedRelationships": [["Starring", "Tom Hanks"], ["Genre", "War"]],
            "situational_description_query": "A war film\nwith Tom Hanks, please.", "data_idx": 3862} | changes


def implicit():
    clues = [{"movie": movie, "relation": "Starring", "person": "Emma Thompson"}
             for movie in ("The_Remains of the Day (1993)", "Another Country (1984)")]  # the second is not in the catalogue
    return record(source_user="4411", condition_num=1, movieSubset=["Junior (1994)", "Peter's Friends (1992)"],
                  movieSubsetId=[256, 3045], sharedRelationships=[["Starring", "Emma Thompson"]], multihop_info=clues, data_idx=1)


def book(**changes):
    return {"source_user": "A1", "condition_num": 1, "bookCount": 2, "bookSubset": ["Emma", "EMMA."], "data_idx": 7,
            "sharedRelationships": [["WRITTEN_BY", "Jane Austen"]], "situational_description_query": "Austen?"} | changes


@pytest.fixture
def write(tmp_path):
    def write(domain="movie", **files):
        folder = tmp_path / "dataset" / domain
        folder.mkdir(parents=True, exist_ok=True)
        if domain == "movie":
            (folder / "movies.dat").write_text(MOVIES)
        for name, content in files.items():
            (folder / f"{name}Query.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path
    return write


def test_an_explicit_record(write):
    bench = load_recbench(write(Explicit=[record()]))
    [query] = bench.queries
    assert (query.id, query.kind, query.num_conditions, query.user) == ("movie-explicit-3862", "explicit", 2, "2326")
    assert query.text == "A war film with Tom Hanks, please."
    assert (query.truths, query.candidates, query.history) == (("356", "2028"), [], [])
    assert query.titles == ("Forrest Gump (1994)", "Saving Private Ryan (1998)")
    assert query.conditions == (("starring", "Tom Hanks"), ("genre", "War"))
    assert bench.items["1"].title == "Toy Story (1995)"
    assert bench.items["1"].attributes == {"genre": ("Animation", "Children's", "Comedy")}


def test_what_queries_say_about_items_is_for_the_graph_and_not_shown(write):
    bench = load_recbench(write(Explicit=[record()], Implicit=[implicit()]))
    assert bench.items["356"].attributes == {"genre": ("Comedy", "Romance", "War")}
    assert bench.graph_items()["356"].attributes == {"genre": ("Comedy", "Romance", "War"), "starring": ("Tom Hanks",)}
    assert bench.facts["515"] == {"starring": ("Emma Thompson",)}  # a clue, spelt The_Remains of the Day


def test_a_misinformed_record_gives_the_true_value_alone(write):
    wrong = [{"movie": "Toy Story (1995)", "relation": "Starring", "original person": "Tom Hanks", "person": "Prof. T."}]
    bench = load_recbench(write(Misinformed=[record(query="Like Toy Story with Prof. T.", misinformed=wrong)]))
    assert bench.queries[0].text == "Like Toy Story with Prof. T."
    assert bench.facts["1"] == {"starring": ("Tom Hanks",)}


def test_profile_records(write):
    titles = ["Les Misérables (1995)", "The Remains of the Day (1993)", "No Such Film (1990)"]
    child = {"reason": "r", "query": "Musicals?", "movie subset": titles}
    interest = {"Shared consecutive movies": ["Toy Story (1995)", "Junior (1994)"], "source_users": ["1", "2"], "data_idx": 4,
                "query & ground true": [{}, child, child | {"movie subset": ["No Such Film (1990)"]}]}
    bench = load_recbench(write(InterestBased=[interest], DemographicsBased=[{"data_idx": 0, "query & ground true": [child]}]))
    first, second = bench.queries
    assert (first.id, first.kind, first.num_conditions) == ("movie-interest-4-0", "interest", 0)  # empty ones are not counted
    assert first.truths == ("73", "515")  # article and lost characters apart, the catalogue's
    assert len(first.titles) == 3  # open-ended answers are scored against all
    assert [h.id for h in first.history] == ["1", "256"] and second.history == []
    assert list(bench.left_out) == ["movie-interest-4-1"]


def test_ids_go_before_misencoded_titles_and_titles_stand_in_for_unknown_ids(write):
    records = [record(movieSubset=["A?????? (1992)"], movieSubsetId=[1320], data_idx=0),
               record(movieSubset=["Alienï¿½ (1992)"], movieSubsetId=[99999], data_idx=1)]
    bench = load_recbench(write(Explicit=records))
    assert [q.truths for q in bench.queries] == [("1320",), ("1320",)]
    assert bench.items["1320"].title == "Alien (1992)" and bench.items["73"].title == "Misrables, Les (1995)"


def test_latin_1_catalogue_and_byte_order_mark(write):
    folder = write(Explicit="\ufeff" + json.dumps([record()]))
    latin = "73::Misérables, Les (1995)::Drama\r\n356::Forrest Gump (1994)::War\r\n".encode("latin-1")
    (folder / "dataset/movie/movies.dat").write_bytes(latin)
    bench = load_recbench(folder)
    assert bench.items["73"].title == "Misérables, Les (1995)" and bench.items["356"].attributes == {"genre": ("War",)}
    assert bench.queries[0].truths == ("356",)


def test_repeated_ids_are_told_apart(write):
    queries = load_recbench(write(Explicit=[record(), record()])).queries
    assert [q.id for q in queries] == ["movie-explicit-3862", "movie-explicit-3862+"]


def test_candidates(write):
    interest = {"Shared consecutive movies": ["Toy Story (1995)"],
                "query & ground true": [{"query": "Funny?", "movie subset": ["Junior (1994)"]}]}
    bench = load_recbench(write(Explicit=[record()], Implicit=[implicit()], InterestBased=[interest]))
    lists = [q for seed in range(200) for q in recbench_queries(bench, num_candidates=8, seed=seed)]
    full = {q.id: q for q in bench.queries}
    for query in lists:
        ids = [c.id for c in query.candidates]
        assert len(set(ids)) == 8
        assert [t for t in full[query.id].truths if t in ids] == list(query.truths) and len(query.truths) == 1
        assert not {h.id for h in query.history} & set(ids)
    of = lambda kind: [q for q in lists if q.kind == kind]
    assert {q.truths[0] for q in of("explicit")} == {"356", "2028"}  # each of the right items takes its turn
    assert "515" not in {c.id for q in of("implicit") for c in q.candidates}  # Emma Thompson's too
    assert "515" in {c.id for q in of("explicit") for c in q.candidates}
    places = [[c.id for c in q.candidates].index(q.truths[0]) for q in lists]
    assert set(places) == set(range(8))


def test_candidates_follow_from_the_seed_and_the_query_alone(write):
    bench = load_recbench(write(Explicit=[record(data_idx=n) for n in range(4)]))
    ids = lambda queries: [[c.id for c in q.candidates] for q in queries]
    lists = recbench_queries(bench, num_candidates=5, seed=1)
    assert ids(recbench_queries(bench, bench.queries[2:], 5, 1)) == ids(lists)[2:]
    assert ids(recbench_queries(bench, num_candidates=5, seed=2)) != ids(lists)
    assert len({tuple(i) for i in ids(lists)}) == 4


def test_two_candidates_never_share_a_title(write):
    folder = write("book", Explicit=[book(bookSubset=["Emma"])])
    titles = ["Emma"] * 20 + ["Dune"] * 20 + ["It"]
    (folder / "dataset/book/books.dat").write_text("".join(f"{n}::{t}\n" for n, t in enumerate(titles)))
    bench = load_recbench(folder, "book")
    for seed in range(20):
        [query] = recbench_queries(bench, num_candidates=3, seed=seed)
        assert sorted(c.title for c in query.candidates) == ["Dune", "Emma", "It"]
    with pytest.raises(InputError, match="only 2 of the catalogue's 41 are left"):
        recbench_queries(bench, num_candidates=4)


def test_nor_titles_that_differ_in_case_alone(write):
    """An answer would name both."""
    folder = write("book", Explicit=[book(bookSubset=["Emma"])])
    (folder / "dataset/book/books.dat").write_text("1::Emma\n2::EMMA\n3::Dune\n4::dune\n")
    for seed in range(20):
        [query] = recbench_queries(load_recbench(folder, "book"), num_candidates=2, seed=seed)
        assert sorted(c.title.lower() for c in query.candidates) == ["dune", "emma"] and query.truths == ("1",)


def test_flags_that_say_nothing_here_are_refused(write):
    folder = write(Explicit=[record()])
    for flag in ({"since": "2020-01-01"}, {"until": "2020-01-01"}, {"core": 5}, {"require": ["price"]}, {"split": "temporal"}, {"negatives": "popularity"},
                 {"skip_bad_lines": True}):
        with pytest.raises(InputError, match="do not apply to RecBench"):
            data.load("recbench:movie", data_dir=folder, **flag)


def test_books_without_a_catalogue_file(write):
    bench = load_recbench(write("book", Explicit=[book(), book(data_idx=8, bookSubset=["Dune"])]), "book")
    assert list(bench.items) == ["Emma", "Dune"] and bench.queries[0].truths == ("Emma",)
    assert bench.queries[0].titles == ("Emma", "EMMA.")
    assert bench.facts["Emma"] == {"written_by": ("Jane Austen",)}


def test_ratings_give_the_history_and_are_never_negatives(write):
    folder = write(Explicit=[record()], Implicit=[implicit()])
    rated = [5000, 5003, 356, 5001, 2028] + list(range(5004, 5020))
    rows = [f"2326::{m}::4::{100 - n}\n" for n, m in enumerate(rated)] + ["4411::515::5::1\n", "4411::1::5::2\n"]
    (folder / "dataset/movie/ratings.dat").write_text("".join(rows))
    bench = data.load("recbench:movie", data_dir=folder, history_length=3).bench
    assert [h.id for h in bench.queries[0].history] == ["5001", "5003", "5000"]  # oldest first, without the right items
    assert [h.id for h in bench.queries[1].history] == ["1"]  # nor 515, which is known to meet the condition
    for seed in range(50):
        [query] = recbench_queries(bench, bench.queries[:1], num_candidates=10, seed=seed)
        assert {c.id for c in query.candidates} & set(map(str, rated)) == set(query.truths)


def test_splits(write):
    records = [record(source_user=str(n // 2), data_idx=n) for n in range(2000)]
    queries = load_recbench(write(Explicit=records)).queries
    splits = split_queries(queries, seed=3)
    assert sum(map(len, splits.values())) == 2000
    assert [len(splits[s]) / 2000 for s in ("train", "validation", "test")] == pytest.approx([0.8, 0.1, 0.1], abs=0.04)
    users = [{q.user for q in s} for s in splits.values()]
    assert not (users[0] & users[1] or users[0] & users[2] or users[1] & users[2])
    ids = lambda queries: {q.id for q in queries}
    fewer = split_queries(queries[500:1500], seed=3)
    assert all(ids(fewer[s]) <= ids(splits[s]) for s in splits)  # stays when files grow
    assert ids(split_queries(queries, seed=4)["test"]) != ids(splits["test"])


@pytest.mark.parametrize("content, message", [
    ("[{", "ExplicitQuery.json: not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ({"a": 1}, "expected a list of records, found dict"),
    ([record(), 3], "record 1: expected an object"),
    ([record(movieSubset=[])], "record 0: `movieSubset` must be a list of titles"),
    ([record(movieSubset="Forrest Gump (1994)")], "`movieSubset` must be a list of titles"),
    ([record(), record(movieSubsetId=[1])], "record 1: `movieSubsetId` must hold one id for each title"),
    ([record(sharedRelationships=[["Starring"]])], r"`sharedRelationships` must be a list of \[relation, value\]"),
    ([record(condition_num=None)], "`condition_num` must be a number"),
    ([record(situational_description_query=" ")], "`situational_description_query` must be the query's text"),
])
def test_broken_records_name_file_and_record(write, content, message):
    with pytest.raises(InputError, match=message):
        load_recbench(write(Explicit=content))


@pytest.mark.parametrize("children, message", [
    ("x", "record 0: `query & ground true` must be a list"),
    ([{"query": "q"}], "record 0 query 0: `movie subset` must be a list of titles"),
    ([{"movie subset": ["Junior (1994)"]}], "record 0 query 0: `query` must be the query's text"),
])
def test_broken_profile_records(write, children, message):
    with pytest.raises(InputError, match=message):
        load_recbench(write(DemographicsBased=[{"query & ground true": children}]))


def test_missing_files_are_named(write, tmp_path):
    with pytest.raises(InputError, match="no folder dataset/movie.*github.com/jiani-huang/RecBench"):
        load_recbench(tmp_path)
    folder = write()
    with pytest.raises(InputError, match="no query file"):
        load_recbench(folder)
    write(Explicit=[record()])
    assert len(load_recbench(folder / "dataset").queries) == 1  # the dataset folder itself will do
    with pytest.raises(InputError, match="no implicit queries in these files; there are explicit"):
        data.query_source(data.load("recbench:movie", data_dir=folder), ["explicit", "implicit"])
    with pytest.raises(InputError, match="movie and book, not 'music'"):
        load_recbench(folder, "music")
    (folder / "dataset/movie/movies.dat").write_text("1::Toy Story (1995)::Comedy\nnonsense\n")
    with pytest.raises(InputError, match="movies.dat line 2: expected 2 or more fields"):
        load_recbench(folder)
    (folder / "dataset/movie/movies.dat").unlink()
    with pytest.raises(InputError, match="movies.dat is missing"):
        load_recbench(folder)


def test_title_keys_of_a_catalogue_are_its_own():
    assert title_key("Seven Samurai (The Magnificent Seven) (1954)") == ("seven samurai (the magnificent seven)", "1954")
    assert title_key("Good, the Bad and the Ugly, The (1966)") == ("the good, the bad and the ugly", "1966")
    assert title_key("Associate, The (L'Associe)(1982)") == ("the associate (l'associe)", "1982")
    assert title_key("(500) Days of Summer (2009)") == ("(500) days of summer", "2009")
    assert title_key("1984 (1984)") == ("1984", "1984") and title_key("(1984)")[0] == title_key("")[0] == ""


@real
def test_real_files():
    bench = load_recbench(DATA)
    assert len(bench.items) == 3883 and not any("\ufffd" in item.title for item in bench.items.values())
    assert len({title_key(item.title) for item in bench.items.values()}) == 3883
    kinds = [q.kind for q in bench.queries]
    assert [kinds.count(k) for k in ("explicit", "implicit", "misinformed", "demographics")] == [35, 11, 11, 279]
    assert not bench.left_out
    assert len({q.id for q in bench.queries}) == 336
    assert all(q.num_conditions == len(q.conditions) for q in bench.queries)
    # of 848 demographics titles two are not the catalogue's: one has lost its article, one is the original of a translation
    short = [q for q in bench.queries if len(q.truths) < len(q.titles)]
    assert [t for q in short for t in q.titles if title_key(t) not in {title_key(bench.items[i].title) for i in q.truths}] == [
        "Hunt for Red October (1990)", "Das Boot (1981)"]
    assert all(len(q.history) == 10 for q in bench.queries if q.kind in ("implicit", "misinformed"))
    lists = recbench_queries(bench, seed=0)
    assert all(len({c.title for c in q.candidates}) == 20 and q.truths[0] in {c.id for c in q.candidates} for q in lists)
    books = load_recbench(DATA, "book")
    assert len(books.queries) == 14 and all(len(q.truths) == len(q.titles) for q in books.queries)



# --- command lines ----------------------------------------------------------------------------------------------------


def test_open_ended_answers_of_a_file(write, tmp_path):
    """The numbers of the command line are those of `open_ended`, under either matching rule."""
    bench = load_recbench(write(Explicit=[record(), record(data_idx=5)]))
    responses = {"3862": "'Saving Private Ryan' [SEP] Forrest Gump [SEP] Heat", "movie-explicit-5": "nothing"}
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"id": i, "response": r}) + "\n" for i, r in responses.items()))
    flags = ["--open-ended", "answers.jsonl", "--data", "recbench:movie", "--data-dir", str(tmp_path)]
    printed = run("eval.py", *flags, cwd=tmp_path).stdout
    report = json.loads((tmp_path / "eval.json").read_text())
    for query, response in zip(bench.queries, responses.values()):
        for match in ("recbench", "exact"):
            assert report["queries"][query.id][match] == open_ended(response, query.titles, match)
    assert report["open_ended"]["recbench"]["ftr"]["mean"] == 0.5 and "ftr" in printed
    (tmp_path / "answers.jsonl").write_text('{"id": "99", "response": "x"}\n')
    assert "line 1: id '99': no query" in run("eval.py", *flags, cwd=tmp_path, code=2).stderr
    assert "recbench" in run("eval.py", "--open-ended", "answers.jsonl", cwd=tmp_path, code=2).stderr
    assert "--data-dir" in run("eval.py", "--open-ended", "answers.jsonl", "--data", "recbench:movie", cwd=tmp_path, code=2).stderr


def test_training_and_answering_on_recbench_records(write, tmp_path):
    """The whole path: queries of the files, negatives of the catalogue, GRPO, evaluation, open-ended answers of the model."""
    write(Explicit=[record(source_user=f"u{n}", data_idx=n, condition_num=1 + n % 2) for n in range(40)])
    data_flags = ["--data", "recbench:movie", "--data-dir", str(tmp_path)]
    run("train.py", "--method", "rerec", *data_flags, "--sft-steps", 2, "--steps", 2, "--batch-lists", 4, "--group-size", 2, "--eval-lists", 4,
        "--max-new-tokens", 8, "--num-queries", 8, "--out", tmp_path / "r", cwd=tmp_path)
    report = json.loads((tmp_path / "r" / "eval.json").read_text())
    assert report["data"] == "recbench-movie" and set(report["systems"]["rl"]["by_kind"]) == {"explicit"}
    run("eval.py", "--run", tmp_path / "r", cwd=tmp_path)
    run("eval.py", "--open-ended", "--run", tmp_path / "r", "--eval-lists", 3, "--max-new-tokens", 8, "--out", "open.json", cwd=tmp_path)
    assert json.loads((tmp_path / "open.json").read_text())["num_queries"] in (2, 3)  # as many as the test users have
    for flags, words in ((data_flags, "--method rerec"), (["--method", "rerec", *data_flags, "--query-kinds", "interest"], "no interest queries"),
                         (["--method", "rerec", *data_flags, "--max-conditions", 1], "have their own"),
                         (["--method", "rerec", "--data", "recbench:book", "--data-dir", str(tmp_path)], "dataset/book")):
        assert words in run("train.py", *flags, "--out", tmp_path / "s", cwd=tmp_path, code=2).stderr
