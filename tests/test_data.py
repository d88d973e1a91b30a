"""Loaders, splits and candidates: what is read, that nothing leaks, and that bad input is named."""

import random

import pytest

import data
from data import InputError, Interaction, Item

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\n"


def write(folder, inter, item, name="shop"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.inter").write_text(inter, encoding="utf-8")
    (folder / f"{name}.item").write_text(item, encoding="utf-8")
    return folder


@pytest.fixture
def shop(tmp_path):
    """40 users, 60 items, real timestamps with ties, written in shuffled order."""
    rng = random.Random(0)
    lines = []
    for u in range(40):
        for i in rng.sample(range(60), rng.randint(4, 15)):
            lines.append(f"u{u}\ti{i}\t{rng.randint(1, 5)}\t{1_600_000_000 + 86400 * rng.randint(0, 60)}\n")
    rng.shuffle(lines)
    items = "".join(f"i{i}\tThing {i}\tBrand {i % 7}\tAll|Kind {i % 5}\n" for i in range(60))
    return write(tmp_path / "shop", INTER + "".join(lines), ITEM + items)


def test_atomic_files_are_read_as_typed(tmp_path):
    folder = write(tmp_path / "s", INTER + "a\tx\t4\t1700086400\na\ty\t5\t1700000000\n",
                   ITEM + "x\tR&amp;D  <b>\u202e\tOPI\tMakeup|Nails\ny\t\t\tHair Care|Rollers\n")
    (folder / "shop.kg").write_text("head_id:token\trelation_id:token\ttail_id:token\nm1\tmade_by\tAnn\nm1\tmade_by\tBob\nm9\tmade_by\tEve\n")
    (folder / "shop.link").write_text("item_id:token\tentity_id:token\nx\tm1\n")
    d = data.load(str(folder))
    assert d.items["x"].title == "R&D <b>"
    assert d.items["x"].attributes == {"brand": ("OPI",), "categories": ("Makeup", "Nails"), "made_by": ("Ann", "Bob")}
    assert d.items["y"].title == "untitled Rollers" and d.items["y"].attributes == {"categories": ("Hair Care", "Rollers")}
    assert [x.item_id for x in d.sequences["a"]] == ["y", "x"]  # by time, not by line
    assert d.sequences["a"][0].rating == 5.0


def test_names_with_dots_and_titles_that_are_missing(tmp_path):
    folder = write(tmp_path / "s", INTER + "a\tx\t4\t1700086400\n", ITEM + f"x\t\t{'B' * 299}\tK {'k' * 290}\n", "shop_2.0")
    (folder / "shop_2.0.user").write_text("user_id:token\tage:token\na\t30\n")
    d = data.load(str(folder))
    assert d.name == "shop_2.0" and d.users == {"a": {"age": "30"}} and list(d.sequences) == ["a"]
    assert d.items["x"].title.startswith("untitled BBB") and len(d.items["x"].title) == data.MAX_TEXT


def test_history_lines_carry_age_and_rating(tmp_path):
    start = 1_600_000_000
    inter = "".join(f"a\ti{n}\t{n + 1}\t{start + 86400 * days}\n" for n, days in enumerate((0, 370, 395, 399, 400)))
    d = data.load(str(write(tmp_path / "s", INTER + inter, ITEM + "".join(f"i{n}\tThing {n}\tB\tK\n" for n in range(40)))))
    e = d.example(("a", 4), num_candidates=5)
    assert [data.describe(h) for h in e.history] == [
        "1 year ago: Thing 0 (B / K, rated 1)", "1 month ago: Thing 1 (B / K, rated 2)", "5 days ago: Thing 2 (B / K, rated 3)",
        "1 day ago: Thing 3 (B / K, rated 4)"]
    assert data.describe(d.items["i4"]) == "Thing 4 (B / K)"


def test_leave_one_out(shop):
    d = data.load(str(shop))
    for user, sequence in d.sequences.items():
        n = len(sequence)
        assert (user, n - 1) in d.splits["test"] and (user, n - 2) in d.splits["validation"]
        assert [p for u, p in d.splits["train"] if u == user] == list(range(1, n - 2))
        assert d.train_length[user] == n - 2


def test_temporal_split_orders_time_and_keeps_its_shares(shop):
    d = data.load(str(shop), "temporal")
    times = {s: [d.sequences[u][p].timestamp for u, p in d.splits[s]] for s in d.splits}
    assert max(times["train"]) < min(times["validation"]) and max(times["validation"]) < min(times["test"])
    total = sum(map(len, times.values()))
    assert total == sum(len(s) - 1 for s in d.sequences.values())
    assert 0.7 < len(times["train"]) / total <= 0.8 and 0.02 < len(times["validation"]) / total < 0.2
    border = min(times["validation"])
    for user, n in d.train_length.items():
        assert all(x.timestamp < border for x in d.sequences[user][:n]) and all(x.timestamp >= border for x in d.sequences[user][n:])


@pytest.mark.parametrize("split", ["leave-one-out", "temporal", None])
def test_nothing_held_out_reaches_training(shop, toy, split):
    """No held-out (user, item) pair in a training prompt, as history, positive or negative, nor in the counts."""
    d = data.load(str(shop), split) if split else toy
    held_out = {(u, d.sequences[u][p].item_id) for s in ("validation", "test") for u, p in d.splits[s]}
    seen = set()
    for e in d.examples("train", num_candidates=8):
        seen |= {(e.user, x.id) for x in e.history + e.candidates}
    assert not seen & held_out
    counts = d.popularity()
    for item in d.items:
        assert counts[item] == sum(x.item_id == item for u, s in d.sequences.items() for x in s[:d.train_length[u]])
    assert not any(p < d.train_length[u] for s in ("validation", "test") for u, p in d.splits[s])


def test_a_history_is_what_came_just_before(shop):
    d = data.load(str(shop))
    for user, p in d.splits["test"]:
        e = d.example((user, p), num_candidates=8, history_length=3)
        assert [h.id for h in e.history] == [x.item_id for x in d.sequences[user][max(0, p - 3):p]]


def test_candidates(shop):
    d = data.load(str(shop))
    places = []
    for user, p in d.splits["test"]:
        e = d.example((user, p), num_candidates=20, seed=3)
        ids = [c.id for c in e.candidates]
        assert len(set(ids)) == 20 and sorted(e.relevance) == [0.0] * 19 + [1.0]
        positive = ids[e.relevance.index(1.0)]
        assert positive == d.sequences[user][p].item_id
        assert not (set(ids) - {positive}) & {x.item_id for x in d.sequences[user]}
        places.append(e.relevance.index(1.0))
    assert len(set(places)) > 10  # shuffled: the positive is anywhere


def test_lists_follow_the_seed_and_nothing_else(shop):
    d = data.load(str(shop))
    alone = d.example(d.splits["test"][7], 10, 5, seed=1)
    again = [e for e in data.load(str(shop)).examples("test", None, 10, 5, seed=1) if e.user == alone.user][0]
    other = d.example(d.splits["test"][7], 10, 5, seed=2)
    assert [c.id for c in alone.candidates] == [c.id for c in again.candidates]
    assert [c.id for c in alone.candidates] != [c.id for c in other.candidates]
    assert [e.user for e in d.examples("test", 5, 10)] == [e.user for e in d.examples("test", 9, 10)][:5]


def test_toy_is_seeded_and_its_users_are_apart(toy):
    assert data.toy(0).sequences == toy.sequences and data.toy(1).sequences != toy.sequences
    users = [{u for u, _ in toy.splits[s]} for s in toy.splits]
    assert not (users[0] & users[1] or users[0] & users[2] or users[1] & users[2])
    assert all(len(e.history) == 10 for s in toy.splits for e in toy.examples(s, 20))


def test_toy_can_be_ranked_from_text_but_not_by_popularity():
    """Counting a candidate's words in the history ranks far better than popularity or any one attribute."""
    from eval import evaluate

    for seed in range(3):
        shop = data.toy(seed)
        examples, counts = shop.examples("test"), shop.popularity()
        words = lambda item: set(item.title.split())
        ndcg = lambda scores: evaluate(scores, examples)[0]["ndcg@10"]["mean"]
        by_text = ndcg([[sum(len(words(c) & words(h)) for h in e.history) for c in e.candidates] for e in examples])
        by_brand = ndcg([[sum(c.attributes["brand"] == h.attributes["brand"] for h in e.history) for c in e.candidates] for e in examples])
        by_count = ndcg([[counts[c.id] for c in e.candidates] for e in examples])
        assert by_text > 0.68 and by_count < 0.4 and by_brand < 0.5


@pytest.mark.parametrize("inter, item, words", [
    ("user_id:token\titem:token\na\tx\n", ITEM + "x\tX\tB\tK\n", ["shop.inter", "item_id"]),
    (INTER + "a\tx\t4\n", ITEM + "x\tX\tB\tK\n", ["shop.inter line 2", "expected 4 fields, found 3"]),
    (INTER + "a\tx\tgood\t1\n", ITEM + "x\tX\tB\tK\n", ["shop.inter line 2", "numbers"]),
    (INTER + "a\tx\t4\t1\na\tz\t4\t2\n", ITEM + "x\tX\tB\tK\n", ["shop.inter line 3", "'z'", "shop.item"]),
    (INTER, "item_id:token\tprice:float\nx\t3\n", ["no title column", "price"]),
    ("user_id\titem_id\n", ITEM, ["shop.inter line 1", "field:type"]),
    ("", ITEM, ["user_id"]),
])
def test_bad_files_are_named(tmp_path, inter, item, words):
    with pytest.raises(InputError) as error:
        data.load(str(write(tmp_path / "s", inter, item)))
    assert all(w in str(error.value) for w in words), error.value


def test_other_bad_input(tmp_path, shop):
    with pytest.raises(InputError, match="no such folder"):
        data.load(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected one NAME.inter"):
        data.load(str(tmp_path / "empty"))
    (shop / "shop.item").unlink()
    with pytest.raises(InputError, match="shop.item.*missing"):
        data.load(str(shop))
    with pytest.raises(InputError, match="--split"):
        data.load("toy", "temporal")


def test_positions_are_no_clock(tmp_path):
    inter = "".join(f"u{u}\ti{n}\t5\t{n + 1}\n" for u in range(3) for n in range(5))
    folder = write(tmp_path / "s", INTER + inter, ITEM + "".join(f"i{n}\tThing {n}\tB\tK\n" for n in range(40)))
    with pytest.raises(InputError, match="timestamps"):
        data.load(str(folder), "temporal")
    assert all(h.ago == "" for h in data.load(str(folder)).examples("test", 1)[0].history)


def test_too_few_items_and_empty_splits(tmp_path):
    folder = write(tmp_path / "s", INTER + "a\tx\t4\t1\na\ty\t4\t2\n", ITEM + "x\tX\tB\tK\ny\tY\tB\tK\n")
    d = data.load(str(folder))
    with pytest.raises(InputError, match="test split is empty"):
        d.examples("test", 1)
    with pytest.raises(InputError, match="lower --num-candidates"):
        d.example(("a", 1), 5)


def test_clean():
    assert data.clean("a\tb\n c\u200b\u202e\x00 ") == "a b c"
    assert len(data.clean("x" * 10**5)) == data.MAX_TEXT and data.clean("") == ""


def test_items_are_their_ids():
    assert Item("a", "one") == Item("a", "two", rating=3.0) and Item("a", "one") != Item("b", "one")
    assert len({Item("a", "one"), Item("a", "two")}) == 1 and Interaction("a") == Interaction("a", 0.0)
