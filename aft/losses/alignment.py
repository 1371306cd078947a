"""Cross-entropy to class texts. B images, K classes."""

import torch.nn.functional as F
from torch import Tensor


def alignment(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Text-guided cross-entropy: the image belongs to its class's text among all training classes.

    ``L = -(1/B) sum_i log softmax_c(s * <z_i, t_c>)[y_i]``

    Args:
        logits_BK: ``s`` times cosines of image and text, the logit scale ``s`` included.
        labels_B: right class of each image, in ``[0, K)``.

    Returns:
        Scalar, in nats, averaged over the batch.

    Reference:
        TeCoA, arXiv 2212.07016 (text-guided contrastive adversarial loss). The paper speaks of a contrastive loss;
        what the released code runs is this cross-entropy over all class prompts, without an image-to-image term.

    Example:
        >>> import torch
        >>> alignment(torch.zeros(2, 4), torch.tensor([0, 3])).round(decimals=4)  # log 4
        tensor(1.3863)
    """
    return F.cross_entropy(logits_BK, labels_B)
