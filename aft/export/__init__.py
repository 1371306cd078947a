"""To where people use CLIP: open_clip, OpenAI's layout, transformers, LLaVA-style towers, ONNX and torch.export.

``python -m aft.export CHECKPOINT --format NAME --out FOLDER`` writes one folder with weights or graph, configuration and model card
(``docs/use_it_elsewhere.md``).
"""

from aft.export.formats import FORMATS, Format, Head
from aft.export.model_card import Provenance, cards_below
from aft.export.write import export

__all__ = ["FORMATS", "Format", "Head", "Provenance", "cards_below", "export"]
