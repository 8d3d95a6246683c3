"""A test experiment that the first rank imports 5 seconds later than the other ranks."""

import os
import time

from tests.support.models import tiny

EXPERIMENTS = {"late": tiny.EXPERIMENTS["tiny"]}

if os.environ.get("RANK") == "0":
    time.sleep(5)
