"""BERT and DistilBERT against transformers used directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pds_ray import catalog
from pds_ray.config import ConfigError
from pds_ray.stages.evaluate import encode

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "a", "red", "dog", "runs", "##s"]
CONTEXT = 16
CAPTIONS = ["a red dog runs", "dog", "a", "the dogs run", "red " * 40, "RED, dog!"]


def save_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A text model with random weights: width 24, 16 tokens."""
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=CONTEXT,
        )  # fmt: skip
        model = transformers.BertModel(config)
    else:
        config = transformers.DistilBertConfig(
            vocab_size=len(WORDS), dim=24, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=CONTEXT
        )
        model = transformers.DistilBertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are so small that every caption looks alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(WORDS)) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_model(tmp_path_factory.mktemp("text") / request.param, request.param)


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        catalog.load_text_encoder(catalog.describe_text_encoder(name), "fp32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(kind: str, folder: Path):
    return catalog.load_text_encoder(catalog.describe_text_encoder(f"{kind}:{folder}"), "fp32")


def test_vectors_are_the_first_token_of_the_last_layer(saved: tuple[str, Path]):
    """Caption by caption, hence without padding; longer ones cut to the context."""
    kind, folder = saved
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    expected, lengths = [], []
    for caption in CAPTIONS:
        ids = [2, *tokenizer(caption, add_special_tokens=False)["input_ids"][: CONTEXT - 2], 3]
        lengths.append(len(ids))
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).last_hidden_state[0, 0].numpy())
    assert max(lengths) == CONTEXT
    assert len(set(lengths)) > 2, "captions of different lengths"
    encoder = loaded(kind, folder)
    found = encoder.encode_captions(CAPTIONS)
    assert (found.dtype, found.shape, encoder.dim) == (np.float32, (len(CAPTIONS), 24), 24)
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-5)
    spread = np.linalg.norm(found[:, None] - found[None], axis=2)[np.triu_indices(4, 1)]
    assert spread.min() > 1e-2, "captions differ"


def test_neighbours_do_not_change_a_caption(saved: tuple[str, Path]):
    kind, folder = saved
    encoder = loaded(kind, folder)
    alone = np.concatenate([encoder.encode_captions([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(encoder.encode_captions(CAPTIONS), alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encode(encoder, CAPTIONS * 50), np.tile(alone, (50, 1)), rtol=1e-4, atol=1e-5)


def test_what_is_known_without_the_weights(saved: tuple[str, Path], tmp_path: Path):
    kind, folder = saved
    info = catalog.describe_text_encoder(f"{kind}:{folder}")
    assert (info.name, info.dim) == (f"{kind}:{folder}", 24)
    other = catalog.describe_text_encoder(f"{kind}:{save_model(tmp_path / 'other', kind, seed=1)}")
    again = catalog.describe_text_encoder(f"{kind}:{save_model(tmp_path / 'again', kind)}")
    assert other.identity != info.identity
    assert again.identity == info.identity, "the same weights elsewhere"


def test_the_other_kind_is_refused(saved: tuple[str, Path]):
    kind, folder = saved
    other = {"bert": "distilbert", "distilbert": "bert"}[kind]
    message = refusal(f"{other}:{folder}")
    assert f"type {kind}, not {other}" in message


def test_missing_and_damaged_models_are_one_line(tmp_path: Path):
    assert "which model" in refusal("bert:")
    assert "bert:FOLDER" in refusal(f"bert:{tmp_path}/none")
    assert "bert:FOLDER" in refusal("bert:bert-base-uncased-that-nobody-has")
    (tmp_path / "empty").mkdir()
    assert "holds no transformers model" in refusal(f"bert:{tmp_path}/empty")
    folder = save_model(tmp_path / "bert", "bert")
    (folder / "model.safetensors").write_bytes(b"junk")
    assert "cannot load the weights" in refusal(f"bert:{folder}")


def test_a_pickle_is_never_loaded(tmp_path: Path):
    folder = save_model(tmp_path / "bert", "bert")
    state = transformers.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "cannot load the weights" in refusal(f"bert:{folder}")
