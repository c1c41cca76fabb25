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
            "call": 3e-06,
            "values": 6e9,
            "tables": {
                "dense": [5e9, 1.4e10, 3.2e10, 5.2e10, 8e10],
                "dense_packed": [5.5e9, 2.7e10, 6.6e10, 8.8e10, 1e11],
                "expert": [5e9, 1.2e10, 2.5e10, 4e10, 5e10],
                "expert_packed": [4.5e9, 1.5e10, 4e10, 7e10, 9e10],
                "batched": [5e9, 1.5e10, 4e10, 7e10, 8.5e10],
                "fused": [6e9, 2.2e10, 6e10, 8.5e10, 9e10],
            },
        },
        {
            "dtype": "bfloat16",
            "threads": 2,
            "call": 3e-06,
            "values": 6e9,
            "tables": {
                "dense": [5e9, 1.4e10, 3.2e10, 5.2e10, 8e10],
                "dense_packed": [5.5e9, 2.7e10, 6.6e10, 8.8e10, 1e11],
                "expert": [5e9, 1.2e10, 2.5e10, 4e10, 5e10],
                "expert_packed": [4.5e9, 1.5e10, 4e10, 7e10, 9e10],
                "batched": [5e9, 1.5e10, 4e10, 7e10, 8.5e10],
                "fused": [6e9, 2.2e10, 6e10, 8.5e10, 9e10],
            },
        },
    ],
}
