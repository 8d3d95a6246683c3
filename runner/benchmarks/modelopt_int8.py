"""Quantizes an ONNX file to int8 with NVIDIA ModelOpt: modelopt_int8.py FP32 IMAGES METHOD INT8.

quantizers.py runs this file with an interpreter that has ModelOpt, and nothing of this project.
"""

import sys

import numpy as np
from modelopt.onnx.quantization import quantize

source, path, method, target = sys.argv[1:]
images = np.load(path)
shape = (min(32, len(images)), *images.shape[1:])  # of a batch; by default, a batch is one image
quantize(
    source,
    quantize_mode="int8",
    calibration_data=images,
    calibration_method=method,
    calibration_shapes=f"images:{'x'.join(map(str, shape))}",
    calibration_eps=["cpu"],
    high_precision_dtype="fp32",  # of all that is not int8; by default fp16
    dq_only=True,  # stores the weights as int8; by default in the other precision, for the engine to quantize
    output_path=target,
)
