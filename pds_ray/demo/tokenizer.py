"""A CLIP tokenizer (byte-level BPE, lower case) with a small vocabulary of the captions' words."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from pds_ray.demo.training import TrainingError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, context_length: int) -> CLIPTokenizer:
    """Learn the merges from captions.

    Ids are laid out as in the original CLIP: bytes, bytes at the end of a word, merges, start, end.
    Any text can be written with them, and the end token has the highest id, by which CLIP finds
    where to read off the text embedding.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    merge_count = vocab_size - len(vocab) - 2
    if merge_count < 0:
        raise TrainingError(
            f"--vocab-size must be at least {len(vocab) + 2}, for the bytes and two marks"
        )
    shell = CLIPTokenizer().backend_tokenizer  # CLIP's own way of normalising and splitting text
    trainee = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trainee.normalizer, trainee.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(vocab) + merge_count,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trainee.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]][:merge_count]
    vocab += [left + right for left, right in merges] + [START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(vocab))},
        merges=merges,  # type: ignore[arg-type]  # pairs are what it takes
        model_max_length=context_length,
    )
