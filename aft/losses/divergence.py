"""Distances between distributions over classes, one value a sample. B images, K classes."""

from torch import Tensor


def kl_divergence(first_BK: Tensor, second_BK: Tensor) -> Tensor:
    """Kullback-Leibler divergence ``KL(P || Q) = sum_k P_k (log P_k - log Q_k)`` of two softmax distributions.

    Args:
        first_BK: logits of P, the temperature included.
        second_BK: logits of Q.

    Returns:
        ``[B]``, in nats, never negative; gradient flows to both.

    Reference:
        PMG-AFT, arXiv 2401.04350 (P the adversarial image's, Q the frozen model's or the clean image's); TRADES, arXiv 1901.08573.

    Example:
        >>> import torch
        >>> one, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
        >>> kl_divergence(one, other).round(decimals=4)  # 0.5 log(0.5 / 0.75) + 0.5 log(0.5 / 0.25)
        tensor([0.1438])
    """
    log_p_BK, log_q_BK = first_BK.log_softmax(1), second_BK.log_softmax(1)
    return (log_p_BK.exp() * (log_p_BK - log_q_BK)).sum(1)


def soft_cross_entropy(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Cross-entropy to soft labels ``-sum_k q_k log softmax(z)_k``; with one-hot labels the usual cross-entropy.

    Args:
        logits_BK: the student's logits, its temperature included.
        target_BK: probabilities, each row sums to one.

    Returns:
        ``[B]``, in nats.

    Reference:
        AGFT, arXiv 2603.29410 (soft labels of the original model on the clean image).

    Example:
        >>> import torch
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]])).exp()
        tensor([4.])
    """
    return -(target_BK * logits_BK.log_softmax(1)).sum(1)
