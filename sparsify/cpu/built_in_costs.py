"""`Costs` as measured on one machine: what is used until a machine's own were measured."""

from __future__ import annotations

from typing import Any

BUILT_IN: dict[str, Any] = {
    "format": 1,
    "machine": "AMD EPYC",
    "rows": [1, 4, 16, 64, 256],
    "rates": [
        {
            "dtype": "float32",
            "threads": 2,
            "call": 5e-06,
            "values": 1e9,
            "tables": {
                "dense": [5e9, 1e10, 4e10, 7e10, 8e10],
                "dense_packed": [8e9, 3e10, 8e10, 9.5e10, 1e11],
                "expert": [5e9, 1e10, 2e10, 4e10, 6e10],
                "expert_packed": [5e9, 1.5e10, 4e10, 7e10, 9e10],
                "batched": [5e9, 1e10, 2e10, 4e10, 6e10],
                "fused": [8e9, 3e10, 6e10, 8.5e10, 9e10],
            },
        },
    ],
}
