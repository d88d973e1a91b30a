"""Amazon's reviews of 2014 (from SNAP) and of 2023 (from UCSD), 5-core: downloads and reader.

Choices of ours: price, sales rank, mean rating and number of ratings are not shown to the model, since they
were collected after the last interaction and so know the future. Of a product's category paths the first is
kept, without its root, which all items of a set share.
"""

import ast
import json
import re
import sys
from http.client import HTTPException

from data import InputError, make_item, read_lines
from extras.recbole import assemble, bad_line, split_fields

AMAZON_2014 = {"beauty": "Beauty", "toys": "Toys_and_Games", "sports": "Sports_and_Outdoors",
               "games": "Video_Games", "instruments": "Musical_Instruments"}
URL_2014 = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
URL_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/"
RELATED = re.compile(r"'related': \{[^{}]*\}")  # long lists of other products, nine tenths of a line of 2014

def read(name, cache):
    """(Dataset without splits, default split) of a set, whose files are in `cache` or downloaded to it."""
    category = AMAZON_2014.get(name) or name.partition(":")[2]
    if not re.fullmatch("[A-Za-z0-9_]+", category):
        raise InputError(f"--data {name}: give a category, such as amazon2023:Video_Games")
    if name in AMAZON_2014:
        reviews = fetch(f"{URL_2014}reviews_{category}_5.json.gz", cache / "amazon-2014")
        meta = fetch(f"{URL_2014}meta_{category}.json.gz", cache / "amazon-2014")
        return read_amazon(name, reviews, meta, review_2014, ast.literal_eval), "leave-one-out"
    reviews = fetch(f"{URL_2023}benchmark/5core/rating_only/{category}.csv.gz", cache / "amazon-2023")
    meta = fetch(f"{URL_2023}raw/meta_categories/meta_{category}.jsonl.gz", cache / "amazon-2023")
    return read_amazon(name, reviews, meta, review_2023, json.loads), "temporal"

def fetch(url, folder):
    """The path of a file, downloaded where it is not there yet. Raises InputError."""
    path = folder / url.rpartition("/")[2]
    if path.exists():
        return path
    import torch.hub  # here, because it takes seconds
    print(f"downloading {url}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # a connection that ends early raises no error: the archive itself has to tell
            torch.hub.download_url_to_file(url, str(path))
            try:
                for _ in read_lines(path):
                    pass
                return path
            except InputError:
                path.unlink()
        reason = "what arrives is cut off or damaged"
    except (OSError, HTTPException, ValueError) as error:
        reason = error
    raise InputError(f"{url}: no download ({reason}). Put it at {path} yourself, or give --cache-dir")

def review_2014(line):  # -> (user, item, time, rating)
    r = json.loads(line)
    return r["reviewerID"].strip(), r["asin"].strip(), str(r["unixReviewTime"]), str(r["overall"])

def review_2023(line):
    user, item, rating, time = split_fields(line, ",")
    return user, item, time, rating

def read_amazon(name, reviews, meta, parse_review, parse_item):
    """The Dataset of reviews, and of metadata with (parent_)asin, title, brand or store, and categories."""
    rows, items = [], {}
    for number, line in read_lines(reviews):
        try:
            user, item_id, *rest = parse_review(line)
        except Exception:  # of the many kinds that a broken line may raise
            expected = "reviewerID, asin, unixReviewTime, overall, or user_id,parent_asin,rating,timestamp"
            raise bad_line((reviews, number), expected, line) from None
        if user != "user_id":  # the header of the CSV
            items[item_id] = None
            rows.append(((reviews, number), user, item_id, *rest, 0))
    for number, line in read_lines(meta):
        ids = re.findall(r"""asin['"]\s*:\s*['"]([^'"]+)['"]""", line)
        if ids and items.keys().isdisjoint(ids):
            continue  # most of the file: products outside the 5-core
        try:
            record = parse_item(RELATED.sub("'related': {}", line))
            item_id, path = record.get("parent_asin") or record["asin"], record.get("categories")
            path = path if path and isinstance(path, list) else [""]
            path = path[0] if isinstance(path[0], list) else path  # 2014: a list of paths
            brand = record.get("brand") or record.get("store")
            if item_id in items:
                attributes = {"brand": [brand], "categories": path[1:] or path}
                items[item_id] = make_item(item_id, record.get("title"), attributes)
        except Exception:
            raise bad_line((meta, number), "an object with asin, title and categories", line) from None
    items = {item_id: items[item_id] or make_item(item_id, "", {}) for item_id in sorted(items)}
    return assemble(name, items, rows)
