"""Which label a text has, by how well a model with each label predicts it: `p(D | x_<t) ~ p(x_<t | D) p(D)`."""

from __future__ import annotations

import torch
from torch import Tensor


def label_posterior(log_likelihoods: Tensor, prior: Tensor | None = None) -> Tensor:
    """The posterior of every label before each token, for models that are routed by label (DEMix, arXiv 2108.05036).

    Mix the predictions of the labels with it where the label of a text is not known, or average models with it
    (`average_models`).

    Args:
        log_likelihoods: `[L, .., S]`, `log p(x_t | x_<t, D)` of S tokens under each of L labels.
        prior: `[L]`, the probabilities of the labels; None: all alike.

    Returns:
        `[L, .., S + 1]`, sums of 1 over the labels: at t given the tokens before t, at S given all of them.

    Raises:
        ValueError: there is no prior probability for each label.
    """
    labels = log_likelihoods.shape[0]
    if prior is None:
        prior = log_likelihoods.new_ones(labels)
    if prior.shape != (labels,):
        raise ValueError(f"prior must hold a probability for each of {labels} labels, got {list(prior.shape)}")
    seen = torch.nn.functional.pad(log_likelihoods.cumsum(-1), (1, 0))
    return torch.softmax(seen + prior.log().view(-1, *[1] * (seen.dim() - 1)), dim=0)
