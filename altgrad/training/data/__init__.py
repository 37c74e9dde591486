"""Text in, batches out; equal seeds mean equal batches in equal order, whatever the format under test.

The default corpus is Python's own documentation (`pydoc_data.topics`, about 465 KB of English), which is on every
machine that runs Python. Others are named: files and folders, EurLex on the Hugging Face hub, a made-up corpus. One
source never stands in for another.

    sources     a name to documents by split (splits, records, hub, synthetic)
    tokenizers  text to ids
    cache       done once per node, mapped by every trial
    corpus      language modelling: two streams of tokens
    documents   classification: labelled documents in three splits
    batches     (seed, step) to a batch
"""

from altgrad.training.data.batches import document_batch, document_rows, split_batches, train_batch, val_batches
from altgrad.training.data.corpus import Corpus, load_corpus
from altgrad.training.data.documents import Documents, load_documents
from altgrad.training.data.sources import ALLOWED, NAMED
from altgrad.training.data.tokenizers import save as save_tokenizer

__all__ = [
    "ALLOWED",
    "NAMED",
    "Corpus",
    "Documents",
    "document_batch",
    "document_rows",
    "load_corpus",
    "load_documents",
    "save_tokenizer",
    "split_batches",
    "train_batch",
    "val_batches",
]
