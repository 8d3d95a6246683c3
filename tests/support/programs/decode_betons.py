"""Decodes .beton files through FFCV, as the streaming loader does, and prints the SHA-256 of each file's pixels."""

import hashlib
import sys

import numpy as np
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption

for path in sys.argv[1:]:
    digest = hashlib.sha256()
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None}
    loader = Loader(path, 50, 1, os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
    for (images,) in loader:
        digest.update(np.ascontiguousarray(images))
    print(digest.hexdigest(), flush=True)
