"""A value of each kind, to be given where another kind is wanted."""

import numpy as np

VALUES = {
    "None": None,
    "True": True,
    "1": 1,
    "-7": -7,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "1e30": 1e30,
    "10**400": 10**400,
    "str": "x",
    "surrogate": "\ud800",
    "bytes": b"x",
    "list": [],
    "list of str": ["x"],
    "list of None": [None],
    "dict": {},
    "dict of str": {"x": 1},
    "dict of ids": {10**9: 1.0},
    "nan bias": {1: float("nan")},
    "object": object(),
    "function": len,
    "array": np.zeros(3),
    "type": int,
}
