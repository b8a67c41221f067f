"""Text from TFDS or files, tokenised once and handed to a trainer in batches by Grain, or learned text by text.

`DataConfig` describes the data, `build_tokenizer` and `tokenize_split` prepare them, `train_batches` and
`validation_batches` hand them out. Importing this package loads neither TFDS nor Grain.
"""

from jaxcost.data.config import DataConfig
from jaxcost.data.packing import TokenStream, tokenize_split
from jaxcost.data.pipeline import train_batches, validation_batches
from jaxcost.data.sources import open_source
from jaxcost.data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer

__all__ = [
    "DataConfig",
    "TokenStream",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "open_source",
    "tokenize_split",
    "train_batches",
    "validation_batches",
]
