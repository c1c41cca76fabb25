"""Routers, one family a file, all with the contract of `Router`."""

from __future__ import annotations

from sparsify.routers.base import Router
from sparsify.routers.mlp_router import MLPRouter

__all__ = ["MLPRouter", "Router"]
