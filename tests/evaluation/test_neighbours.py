"""A defence that couples images sees the batch that it is shown: who is attacked does not change an image's neighbours."""

from __future__ import annotations

import numpy as np
import torch

from aft.clip.stages import Stage
from aft.evaluation.defended import DefendedJudge
from aft.evaluation.judge import scoring
from tests.evaluation.test_defended import cell_for
from tests.staged import defended


def test_images_that_are_not_attacked_stay_neighbours_of_those_that_are(model, data):
    """A's points stand in the batch in which the clean images stood, beside the clean images that nobody attacks."""
    sizes = []

    def centred(x, draw):
        """Couples, and notes how many there are."""
        sizes.append(len(x))
        return (x - x.mean((0, 2, 3), keepdim=True) + 0.5).clamp(0, 1)

    cell = cell_for(defended(model, pixels=Stage(centred, batch_coupled=True)), data, "oblivious")
    with scoring(cell.model):
        judge = DefendedJudge(cell)
        found = judge.first(range(40))
        whole = set(sizes)
        shown = judge.show(range(40))
        clean = judge.candidate(shown, shown.images_nCHW)
        places = ((clean["selection"] > 0) | judge._base_right(shown, shown.images_nCHW)).nonzero().flatten()
        assert 0 < len(places) < 40, "some images are wrong for both models, and are not attacked"
        points = shown.images_nCHW.clone()
        points[places] = judge._against_undefended(judge.moves[0], shown.only(places))
        expected = judge.candidate(shown, points)
    assert whole == {40}
    assert np.array_equal(found["selection"][:, 1], expected["selection"].numpy()) and torch.equal(
        torch.from_numpy(found["answer"][:, 1]), expected["answer"]
    )
