"""What routers ask of training beside the loss of the task: balance, z, importance, load, entropies, consistency.

Pure functions of a batch. Each returns a scalar, 0 for a batch without tokens; coefficients are the routers' affair.
Counts pass no gradient on, probabilities and logits do. T tokens, E num_experts, K slots of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_tokens(expert_ids: Tensor, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens that each expert got.

    Args:
        expert_ids: `[T, K]` int64; -1 counts for none.
        num_experts: E.
        dtype: of the result.

    Returns:
        `[E]`.
    """
    places = expert_ids.flatten() + 1
    counts = torch.zeros(num_experts + 1, dtype=dtype, device=expert_ids.device)
    return counts.scatter_add(0, places, torch.ones_like(places, dtype=dtype))[1:]


def balance_loss(probabilities: Tensor, expert_ids: Tensor, num_groups: int | None = None) -> Tensor:
    """Switch's load balance `E sum_e f_e P_e` (arXiv 2101.03961, eq. 4), the same for every K.

    f_e is the share of assignments that expert e got, P_e its mean probability. It is 1 where either is uniform and E
    where all tokens are sure of one expert; it can be below 1. Mesh, GShard and ST-MoE count first choices only (give
    `expert_ids[:, :1]`); Mixtral in transformers does not divide by K, so its value is K times this one.

    Args:
        probabilities: `[T, E]`, rows that sum to 1.
        expert_ids: `[T, K]`, before anything is dropped; -1 for a slot not used.
        num_groups: D, to balance D runs of E / D experts instead: the device loss of DeepSeekMoE (arXiv 2401.06066,
            eq. 15).
    """
    num_experts = probabilities.shape[1]
    counts = count_tokens(expert_ids, num_experts, probabilities.dtype)
    share, mean = counts / counts.sum().clamp(min=1), _token_mean(probabilities)
    groups = num_groups or num_experts
    return groups * (share.view(groups, -1).sum(1) * mean.view(groups, -1).sum(1)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """`mean_t (logsumexp_e l_te)^2` of logits `[T, E]`, which keeps them small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _token_mean(torch.logsumexp(logits, dim=-1).square())


def cv_squared(values: Tensor) -> Tensor:
    """Variance (of the population) over squared mean of `[E]`; at most E - 1, where one has all. 0 if all are 0."""
    mean = values.mean()
    return (values - mean).square().mean() / mean.square().clamp(min=torch.finfo(values.dtype).tiny)


def importance_loss(routing_weights: Tensor) -> Tensor:
    """`CV(sum_t w_te)^2` of weights `[T, E]`, 0 where not chosen (Shazeer et al., arXiv 1701.06538, eq. 7)."""
    return cv_squared(routing_weights.sum(0))


def load_probability(
    clean: Tensor, noisy: Tensor, sigma: Tensor | float, top_k: int, *, drawn_again: bool = True
) -> Tensor:
    """How likely each expert is among the K largest if the noise of its logit alone were drawn again.

    Shazeer et al., arXiv 1701.06538, appendix A, eq. 8 and 9.

    Args:
        clean: logits `[T, E]`.
        noisy: the same plus the noise that was drawn.
        sigma: its standard deviation, `[T, E]` or one number.
        top_k: K; with K = E all are certain.
        drawn_again: compare with the K-th largest of the other noisy logits, as there. False compares with the K-th
            largest of all, as V-MoE does (arXiv 2106.05974).

    Returns:
        `[T, E]`; a token's sum is about K.
    """
    if top_k == clean.shape[1]:
        return torch.ones_like(clean)
    ranked = noisy.topk(top_k + 1, dim=-1).values
    last, next_one = ranked[:, -2:-1], ranked[:, -1:]  # [T, 1] each
    threshold = torch.where(noisy > next_one, next_one, last) if drawn_again else last
    return torch.special.ndtr((clean - threshold) / sigma)


def load_loss(probability: Tensor) -> Tensor:
    """`CV(sum_t P_te)^2` of `load_probability` `[T, E]`: a count of tokens that has a gradient."""
    return cv_squared(probability.sum(0))


def entropy(probabilities: Tensor) -> Tensor:
    """`-sum_e p_e log p_e` over the last dimension; finite gradients where p is 0."""
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum(-1)


def local_entropy_loss(probabilities: Tensor, members: Tensor | None = None) -> Tensor:
    """`mean_t H(p_t)` of `[T, E]`: 0 where every token is sure (LIMoE, arXiv 2206.02770, eq. 1).

    Args:
        probabilities: `[T, E]`.
        members: `[T, M]`, 1 where a token is of a modality: the mean over those that have tokens. None: one has all.
    """
    return _over_modalities(_modality_means(entropy(probabilities).unsqueeze(-1), members).squeeze(-1), members)


def global_entropy_loss(probabilities: Tensor, threshold: float, members: Tensor | None = None) -> Tensor:
    """`max(0, threshold - H(mean_t p_t))` of `[T, E]` (LIMoE, arXiv 2206.02770, eq. 2).

    A threshold of `log S` asks that the tokens use at least S experts. 0 for no tokens. `members` as above.
    """
    loss = torch.relu(threshold - entropy(_modality_means(probabilities, members)))  # [M]
    return _over_modalities(loss, members) if probabilities.shape[0] else torch.zeros_like(loss.sum())


def sparsity_loss(probabilities: Tensor) -> Tensor:
    """`mean_t |p_t|_1 / |p_t|_2` of `[T, E]`: 1 where every token is sure, sqrt(E) where none is.

    SpeechMoE (arXiv 2105.03036); its formula was not read (unverified).
    """
    return _token_mean(probabilities.sum(-1) / probabilities.square().sum(-1).sqrt())


def mean_importance_loss(probabilities: Tensor) -> Tensor:
    """`E sum_e (mean_t p_te)^2` of `[T, E]`: 1 where the means are equal, E at collapse.

    SpeechMoE (arXiv 2105.03036); its formula was not read (unverified).
    """
    return probabilities.shape[1] * _token_mean(probabilities).square().sum()


def consistency_loss(logits: Tensor, other: Tensor) -> Tensor:
    """Symmetric KL divergence `mean_t 1/2 sum_e (p - q)(log p - log q)` of two outputs `[T, C]` (THOR, 2110.04260)."""
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    return 0.5 * _token_mean(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1))


def _token_mean(values: Tensor) -> Tensor:
    """Mean over the first dimension, 0 where it is empty."""
    return values.sum(0) / values.new_ones(values.shape[0]).sum().clamp(min=1)


def _modality_means(values: Tensor, members: Tensor | None) -> Tensor:
    """`[T, C]` to `[M, C]`, 0 for a modality without tokens."""
    if members is None:
        return _token_mean(values).unsqueeze(0)
    members = members.to(values.dtype)
    return members.t() @ values / members.sum(0).clamp(min=1).unsqueeze(-1)


def _over_modalities(values: Tensor, members: Tensor | None) -> Tensor:
    """Mean of `[M]` over the modalities that have tokens."""
    if members is None:
        return values.mean()
    present = (members.sum(0) > 0).to(values.dtype)
    return (values * present).sum() / present.sum().clamp(min=1)
