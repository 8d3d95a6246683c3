"""The tests' experiments, imported 5 seconds later by the first rank than by the others."""

import os
import time

from tests.support.models import tiny

EXPERIMENTS = {"late": tiny.EXPERIMENTS["tiny"]}

if os.environ.get("RANK") == "0":
    time.sleep(5)
