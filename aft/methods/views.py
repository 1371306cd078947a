"""Views: what learns. The student's encodings with gradient, in training mode, opened after the attack.

Shapes: B images, K classes, M captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from torch import Tensor

from aft.clip import Encoding, ZeroShotModel
from aft.errors import ConfigError


class Views:
    """The student on the adversarial and on the clean images, each encoded at most once and only when a term asks.

    Args:
        student: the model being trained.
        text: text banks that learn, by name, each a function that gives ``[K, D]``.
        fixed: the banks of the targets, for all that do not learn.
        logit_scale: a fixed factor on cosines; none means the model's own, with gradient where it is trained.
        tokens: whether encodings carry patch tokens.
    """

    def __init__(
        self,
        student: ZeroShotModel,
        *,
        text: Mapping[str, Callable[[], Tensor]],
        fixed: Mapping[str, Tensor],
        logit_scale: float | None = None,
        tokens: bool = False,
    ) -> None:
        self._student = student
        self._text = text
        self._fixed = fixed
        self._banks: dict[str, Tensor] = {}
        self._logit_scale = logit_scale
        self._tokens = tokens
        self._images: tuple[Tensor, Tensor | None] | None = None

    def open(self, clean_BCHW: Tensor, adversarial_BCHW: Tensor | None) -> None:
        """Lets terms in. Without an attack ``clean`` stands for ``adversarial``."""
        self._images = (clean_BCHW, adversarial_BCHW)

    def _opened(self) -> tuple[Tensor, Tensor | None]:
        if self._images is None:
            raise ConfigError("a view was touched inside the attack: views learn and open after it; an objective reads targets only.")
        return self._images

    @cached_property
    def clean(self) -> Encoding:
        """The student on the clean images, with gradient."""
        return self._student.encode(self._opened()[0], tokens=self._tokens).precise

    @cached_property
    def adversarial(self) -> Encoding:
        """The student on the adversarial images, with gradient."""
        adversarial_BCHW = self._opened()[1]
        return self.clean if adversarial_BCHW is None else self._student.encode(adversarial_BCHW, tokens=self._tokens).precise

    def text(self, bank: str) -> Tensor:
        """A text bank, ``[K, D]``, with gradient where the text side learns."""
        self._opened()
        if bank not in self._text:
            return self._fixed[bank]
        if bank not in self._banks:
            self._banks[bank] = self._text[bank]()
        return self._banks[bank]

    def logits(self, encoding: Encoding, bank: str = "class") -> Tensor:
        """``logit_scale * unit(image) @ unit(text).T``, ``[B, K]``, fp32."""
        return self.logits_over(encoding, self.text(bank))

    def logits_over(self, encoding: Encoding, text_KD: Tensor) -> Tensor:
        """The same over given texts."""
        return self._student.logits(encoding, text_KD, self._logit_scale)
