"""BERT and DistilBERT against transformers used directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pds_ray import catalog
from pds_ray.config import ConfigError
from pds_ray.stages.trial import encode
from tests.support.tiny_models import TEXT_CONTEXT, save_text_model

CAPTIONS = ["a red dog runs", "dog", "a", "the dogs run", "red " * 40, "RED, dog!"]


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    return request.param, save_text_model(
        tmp_path_factory.mktemp("text") / request.param, request.param
    )


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
        ids = [2, *tokenizer(caption, add_special_tokens=False)["input_ids"][: TEXT_CONTEXT - 2], 3]
        lengths.append(len(ids))
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).last_hidden_state[0, 0].numpy())
    assert max(lengths) == TEXT_CONTEXT
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
    np.testing.assert_allclose(
        encode(encoder, CAPTIONS * 50), np.tile(alone, (50, 1)), rtol=1e-4, atol=1e-5
    )


def test_what_is_known_without_the_weights(saved: tuple[str, Path], tmp_path: Path):
    kind, folder = saved
    info = catalog.describe_text_encoder(f"{kind}:{folder}")
    assert (info.name, info.dim) == (f"{kind}:{folder}", 24)
    other = catalog.describe_text_encoder(
        f"{kind}:{save_text_model(tmp_path / 'other', kind, seed=1)}"
    )
    again = catalog.describe_text_encoder(f"{kind}:{save_text_model(tmp_path / 'again', kind)}")
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
    folder = save_text_model(tmp_path / "bert", "bert")
    (folder / "model.safetensors").write_bytes(b"junk")
    assert "cut off or damaged" in refusal(f"bert:{folder}")


def test_a_pickle_is_never_loaded(tmp_path: Path):
    folder = save_text_model(tmp_path / "bert", "bert")
    state = transformers.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "cannot load the weights" in refusal(f"bert:{folder}")
