"""All models of the zoo, by name: the model type, or what a plain module is."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from tests.zoo import multimodal, plain, sound, text, vision
from tests.zoo.build import Plain, Specimen
from tests.zoo.inputs import inputs_of

CATALOG: dict[str, Specimen | Plain] = {
    kind: Specimen(kind, head, part.CHANGES.get(kind, {}), part.INPUTS.get(kind, inputs_of))
    for part in (vision, sound, multimodal, text)
    for kind, head in part.HEADS.items()
    if kind in CONFIG_MAPPING  # older releases have fewer
}
CATALOG |= {name: Plain(*made) for name, made in plain.MODULES.items()}
