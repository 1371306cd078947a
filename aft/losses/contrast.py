"""Images against captions. B images, M captions."""

from torch import Tensor


def caption_contrast(logits_BM: Tensor, true_BM: Tensor) -> Tensor:
    """InfoNCE in both directions, where several captions may be true of an image and several images fit a caption.

    ``L = (CE(rows) + CE(columns)) / 2`` with ``CE(rows) = -(1/B') sum_i (1/|P_i|) sum_{m in P_i} log softmax_m(logits_i)[m]``;
    ``P_i`` are the captions true of image ``i``, ``B'`` the images that have one. Columns likewise.
    With the identity as truth this is CLIP's loss; one caption a class makes its row part a class-caption cross-entropy.

    Args:
        logits_BM: logit scale times cosines of images and captions.
        true_BM: bool, whether the caption is true of the image. Rows or columns without any truth do not count.

    Returns:
        Scalar, in nats.

    Reference:
        CLIP, arXiv 2103.00020 (symmetric InfoNCE); several positives as in UniCL, arXiv 2204.03610.

    Example:
        >>> import torch
        >>> caption_contrast(torch.zeros(2, 2), torch.eye(2, dtype=torch.bool)).round(decimals=4)  # log 2
        tensor(0.6931)
    """
    return (_one_direction(logits_BM, true_BM) + _one_direction(logits_BM.T, true_BM.T)) / 2


def image_to_caption(logits_BM: Tensor, true_BM: Tensor) -> Tensor:
    """The image-to-text half, one value an image: ``-(1/|P_i|) sum_{m in P_i} log softmax_m(logits_i)[m]``; 0 without a true caption.

    Args:
        logits_BM: logit scale times cosines of images and captions.
        true_BM: bool, whether the caption is true of the image.

    Returns:
        ``[B]``, in nats.

    Example:
        >>> import torch
        >>> image_to_caption(torch.zeros(1, 4), torch.tensor([[True, True, False, False]])).exp()
        tensor([4.])
    """
    weight_BM = true_BM.to(logits_BM.dtype)
    return -(weight_BM * logits_BM.log_softmax(1)).sum(1) / weight_BM.sum(1).clamp_min(1)


def _one_direction(logits_BM: Tensor, true_BM: Tensor) -> Tensor:
    return image_to_caption(logits_BM, true_BM).sum() / true_BM.any(1).sum().clamp_min(1)
