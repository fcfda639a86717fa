"""Data sets and the input pipeline.

Example:

>>> import tempfile
>>> dataset = load("digits", data_dir=tempfile.mkdtemp())
>>> batches = Batches(dataset, batch_size=128, seed=0, augment=augmentation("digits"))
>>> batches[1_000]["image"].shape
(128, 8, 8, 1)
"""

from nestnet.data.augment import by_name as augmentation
from nestnet.data.crops import Crops
from nestnet.data.draws import Draws
from nestnet.data.images import Dataset
from nestnet.data.images import Source
from nestnet.data.pipeline import arrays
from nestnet.data.pipeline import Batches
from nestnet.data.sources import load
from nestnet.data.text import Text
from nestnet.data.tokenization import Tokenizer
from nestnet.data.tokenization import tokenizer

__all__ = ["Batches", "Crops", "Dataset", "Draws", "Source", "Text", "Tokenizer", "arrays", "augmentation",
           "load", "tokenizer"]
