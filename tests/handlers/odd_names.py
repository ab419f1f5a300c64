"""Answer with an array named as the input; "nul" and "number" give names that no frame carries."""

import numpy as np

NAMES = {"nul": "a\0b", "number": 1}


def handle(data, context):
    return [{NAMES.get(name, name): np.ones(1) for name in each} for each in data] if data else None
