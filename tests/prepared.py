"""What processes that tests fork find imported and made: see `fork` in runs.py."""

import policy
import runs

runs.SHOP(0)
policy.load("tiny", texts=["a b"])
