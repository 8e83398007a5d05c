"""Images and prose from common file formats, chosen by seed and paired at random as in the paper."""

from modality_integration.app.samples.choosing import Chosen
from modality_integration.app.samples.chosen_samples import ChosenSamples, choose
from modality_integration.app.samples.images import choose_images, image_files, open_image
from modality_integration.app.samples.pairing import Samples, groups_of, pair, samples_digest
from modality_integration.app.samples.sample import ImageSource, Sample, Stored, Text
from modality_integration.app.samples.texts import TEXT_SUFFIXES, choose_texts

__all__ = [
    "TEXT_SUFFIXES",
    "Chosen",
    "ChosenSamples",
    "ImageSource",
    "Sample",
    "Samples",
    "Stored",
    "Text",
    "choose",
    "choose_images",
    "choose_texts",
    "groups_of",
    "image_files",
    "open_image",
    "pair",
    "samples_digest",
]
