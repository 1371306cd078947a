"""ZeroShotModel: what pixels become, how often encoders run, and in which precision."""

import pytest
import torch
import torch.nn.functional as F

from aft.clip import Encoding, ZeroShotModel
from aft.clip.towers import encode_with_tokens, has_tokens
from aft.errors import ConfigError, InputError
from tests.conftest import Calls

NAMES, TEMPLATES = ("cat", "dog", "ship"), ("a {}", "the {}.")


def test_logits_are_scaled_cosines_of_normalised_pixels_and_mean_prompts(model: ZeroShotModel) -> None:
    """``s * cos(image, mean over templates of unit texts)``, from the formula in float64 with open_clip's own towers."""
    model.double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (model.record.mean, model.record.std))
    image = F.normalize(model.clip.encode_image((images - mean) / std), dim=-1)
    text = [F.normalize(model.clip.encode_text(model.tokenizer([t.format(n) for t in TEMPLATES])), dim=-1).mean(0) for n in NAMES]
    expected = model.clip.logit_scale.exp() * image @ F.normalize(torch.stack(text), dim=-1).T
    torch.testing.assert_close(model(images, model.text_bank(NAMES, TEMPLATES)), expected, rtol=1e-6, atol=1e-6)


def test_the_scale_is_neither_cancelled_nor_doubled(model: ZeroShotModel) -> None:
    """Logits lie within +- the recorded scale and change by its factor."""
    bank, images = model.text_bank(NAMES, TEMPLATES), torch.rand(4, 3, 32, 32)
    encoding = model.encode(images)
    assert model.record.logit_scale == pytest.approx(20.0, rel=1e-5)
    torch.testing.assert_close(model.logits(encoding, bank), 20.0 * model.logits(encoding, bank, logit_scale=1.0))


def test_normalisation_and_resize_are_in_the_graph(model: ZeroShotModel) -> None:
    """The gradient reaches the pixels of an image of another size, and agrees with finite differences."""
    model.double()
    bank = model.text_bank(NAMES, TEMPLATES)
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x, bank)[0, 0], x)
    for place in [(0, 0, 3, 4), (0, 1, 10, 10), (0, 2, 19, 0)]:
        step = torch.zeros_like(x)
        step[place] = 1e-5
        with torch.no_grad():
            slope = (model(x + step, bank) - model(x - step, bank))[0, 0] / 2e-5
        assert gradient[place] == pytest.approx(float(slope), rel=1e-4, abs=1e-9)


def test_tokens_come_from_the_same_pass(model: ZeroShotModel) -> None:
    """One call of the tower gives embedding and tokens; the embedding is that of the pass without tokens."""
    calls = Calls(model.visual)
    images = torch.rand(2, 3, 32, 32)
    encoding = model.encode(images, tokens=True)
    assert calls.count == 1
    assert encoding.tokens_BND is not None and encoding.tokens_BND.shape == (2, 16, 16)
    torch.testing.assert_close(encoding.embedding_BD, model.encode(images).embedding_BD)
    assert model.encode(images).tokens_BND is None


def test_the_class_token_projected_like_a_patch_is_the_embedding(model: ZeroShotModel) -> None:
    """Patch tokens live in the joint space: the same norm and projection applied to the class token give the embedding."""
    pixels = model.pixels(torch.rand(2, 3, 32, 32))
    visual = model.visual
    every = visual.ln_post(visual.transformer(visual._embeds(pixels))) @ visual.proj
    embedding, tokens = encode_with_tokens(visual, pixels)
    torch.testing.assert_close(every[:, 0], embedding)
    torch.testing.assert_close(every[:, 1:], tokens)


def test_a_tower_without_tokens_says_so() -> None:
    """Tokens asked of a tower that has none are an error, not a wrong tensor."""
    assert not has_tokens(torch.nn.Flatten())
    with pytest.raises(ConfigError, match="Flatten has no patch tokens"):
        encode_with_tokens(torch.nn.Flatten(), torch.rand(1, 3, 4, 4))


def test_the_text_tower_runs_once_a_class_list(model: ZeroShotModel) -> None:
    """A bank is kept by names, templates and text weights, and made anew when any of them changes."""
    for parameter in model.text_parameters:
        parameter.requires_grad_(False)
    calls = Calls(model.clip.transformer)
    first = model.text_bank(NAMES, TEMPLATES)
    assert model.text_bank(NAMES, TEMPLATES) is first and calls.count == 1
    model.text_bank(NAMES, TEMPLATES[:1])
    assert calls.count == 2
    with torch.no_grad():
        model.clip.text_projection.mul_(2).add_(0.1)
    assert not torch.equal(model.text_bank(NAMES, TEMPLATES), first) and calls.count == 3


def test_logits_are_fp32_under_autocast(model: ZeroShotModel) -> None:
    """Half precision is the tower's affair; cosines and scale are fp32."""
    bank = model.text_bank(NAMES, TEMPLATES)
    with torch.autocast("cpu", torch.bfloat16):
        encoding = model.encode(torch.rand(2, 3, 32, 32))
        assert encoding.embedding_BD.dtype == torch.bfloat16
        assert model.logits(encoding, bank).dtype == torch.float32


def test_a_foreign_bank_is_refused(model: ZeroShotModel) -> None:
    """A bank of another width names both widths."""
    with pytest.raises(ConfigError, match="width 8 against image embeddings of width 16"):
        model.logits(Encoding(torch.rand(2, 16)), torch.rand(3, 8))


def test_a_text_tower_that_learns_keeps_no_bank(model: ZeroShotModel) -> None:
    """Writes that torch does not count (fused optimisers, ``.data``) cannot leave a stale bank behind."""
    for parameter in model.text_parameters:
        parameter.requires_grad_(True)
    first = model.text_bank(NAMES, TEMPLATES)
    model.clip.text_projection.data.add_(0.1)
    assert not torch.equal(model.text_bank(NAMES, TEMPLATES), first)


@pytest.mark.parametrize("answer, words", [
    (lambda x: torch.zeros(len(x), 4, 32), r"\(2, 4, 32\) for 2 images"), (lambda x: torch.zeros(32), r"\(32,\)"),
    (lambda x: torch.zeros(1, 32), r"\(1, 32\) for 2"), (lambda x: (x, x), "returns tuple"),
])  # fmt: skip
def test_a_foreign_tower_must_give_one_vector_an_image(model: ZeroShotModel, answer, words: str) -> None:
    """Tokens, one vector for all, or several outputs are named."""
    class Foreign(torch.nn.Module):
        """Some other tower."""

        def forward(self, x):
            """Its answer."""
            return answer(x)

    model.clip.visual = Foreign()
    with pytest.raises(InputError, match=words):
        model.encode(torch.rand(2, 3, 32, 32))
