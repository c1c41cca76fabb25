"""The softmax of the K largest logits (Shazeer et al., arXiv 1701.06538, without noise; Mixtral, arXiv 2401.04088)."""

from __future__ import annotations

from sparsify.routers.base import System
from sparsify.routers.linear_router import LinearRouter
from sparsify.routers.token_choice import TokenChoiceRouter


class TopKRouter(LinearRouter, TokenChoiceRouter):
    """Routing weights are the softmax over the K chosen logits, so they sum to 1."""

    system = System(
        name="top-k",
        paper="Mixtral of Experts (arXiv 2401.04088)",
        mechanism="the K largest of linear logits, weighted by their softmax",
        export_form="top-k",
    )
    normalised = True
