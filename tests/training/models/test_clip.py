"""CLIP's loss is the paper's, both towers can learn, and a written model is the one that is
read.
"""

import math
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from training.jobs.train import write_model
from training.models import clip
from training.models.clip import CLIP, LOGIT_SCALE_MAX, contrastive_loss, sigmoid_loss
from training.models.pixels import to_pixels
from training.models.tokenizer import PAD, Tokenizer
from training.sections.clip_section import ClipConfig
from training.sections.tokenizer_section import TokenizerConfig

TEXTS = [
    "red",
    "a green disc",
    "a blue square on a white ground",
    "black",
    "two yellow crosses",
    "a heart",
    "an apple, half eaten",
    "grey",
]
Tower = Literal["conv", "vit"]
TOWERS: list[Tower] = ["conv", "vit"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.fit(TEXTS, TokenizerConfig(vocab_size=300, context=16))


def tiny(tower: Tower, tokenizer: Tokenizer, **changes: Any) -> CLIP:
    torch.manual_seed(0)
    config = ClipConfig(
        image_tower=tower,
        image_size_px=16,
        width=16,
        depth=1,
        text_width=32,
        text_depth=1,
        embed_dim=16,
        **changes,
    )
    return CLIP(config, tokenizer.vocab_size, tokenizer.context)


def images(count: int, side: int = 16) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, side, side, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )


def test_loss_is_the_mean_of_both_log_softmaxes_on_the_diagonal() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale = torch.tensor(1.3)
    expected = 0.0
    for a, b in ((image, text), (text, image)):
        for row in range(6):
            weights = [
                float((scale.exp() * (a[row] * b[column]).sum()).exp()) for column in range(6)
            ]
            expected -= float(torch.tensor(weights[row] / sum(weights)).log()) / 12
    assert float(contrastive_loss(image, text, torch.arange(6), scale)) == pytest.approx(
        expected, rel=1e-5
    )


def test_sigmoid_loss_judges_every_pair_for_itself() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(1.3), torch.tensor(-2.0)
    expected = 0.0
    for row in range(6):
        for column in range(6):
            logit = float(scale.exp() * (image[row] * text[column]).sum() + bias)
            expected += math.log1p(math.exp(-logit if row == column else logit)) / 6
    assert float(sigmoid_loss(image, text, torch.arange(6), scale, bias)) == pytest.approx(
        expected, rel=1e-5
    )


def test_pairs_with_one_caption_are_right_for_each_other() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    captions, scale, bias = torch.tensor([5, -3, 5, 9]), torch.tensor(1.3), torch.tensor(-2.0)
    text[2] = text[0]
    expected = {"softmax": 0.0, "sigmoid": 0.0}
    for row in range(4):
        right = [column for column in range(4) if captions[column] == captions[row]]
        for a, b in ((image, text), (text, image)):
            weights = [
                math.exp(float(scale.exp() * (a[row] * b[column]).sum())) for column in range(4)
            ]
            expected["softmax"] -= (
                sum(math.log(weights[column] / sum(weights)) / len(right) for column in right) / 8
            )
        for column in range(4):
            logit = float(scale.exp() * (image[row] * text[column]).sum() + bias)
            expected["sigmoid"] += math.log1p(math.exp(-logit if column in right else logit)) / 4
    assert float(contrastive_loss(image, text, captions, scale)) == pytest.approx(
        expected["softmax"], rel=1e-5
    )
    assert float(sigmoid_loss(image, text, captions, scale, bias)) == pytest.approx(
        expected["sigmoid"], rel=1e-5
    )


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_batch_of_one_caption_repeated_can_be_learnt(
    loss: str, chunk: int, tokenizer: Tokenizer
) -> None:
    model = tiny("conv", tokenizer, loss=loss, chunk=chunk)
    pixels, ids = to_pixels(images(8), 16), tokenizer(["a green disc"] * 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        value = model.loss(pixels, ids)
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(value.detach()))
    least = math.log(8) if loss == "softmax" else 0.0  # all are equally right, or all are pairs
    assert all(map(math.isfinite, losses)) and losses[-1] - least < 0.02 * (losses[0] - least)


def test_equal_texts_have_equal_marks_however_they_are_padded(tokenizer: Tokenizer) -> None:
    ids = tokenizer([*TEXTS, "red"])
    found = clip.marks(ids)
    assert found[0] == found[-1] and len(set(found.tolist())) == len(TEXTS)
    assert clip.marks(torch.nn.functional.pad(ids, (0, 5), value=PAD)).equal(found)
    many = torch.randint(1, 300, (4096, 6), generator=torch.Generator().manual_seed(0)).unique(
        dim=0
    )
    both = torch.cat([many, many.flip(1)]).unique(dim=0)  # the order of the words counts
    assert len(clip.marks(both).unique()) == len(both) > 8000


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_batch_in_chunks_has_the_gradients_of_the_whole(
    loss: str, precision: torch.dtype, tokenizer: Tokenizer
) -> None:
    found = []
    for chunk in (0, 3, 8):
        model = tiny("vit", tokenizer, loss=loss, chunk=chunk)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
            value = model.loss(to_pixels(images(8), 16), tokenizer(TEXTS))
        value.backward()
        found.append((value.detach(), {name: p.grad for name, p in model.named_parameters()}))
    tolerance = 1e-5 if precision is torch.float32 else 2e-2
    for value, gradients in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=tolerance, atol=0)
        for name, gradient in gradients.items():
            whole = found[0][1][name]
            assert gradient is not None and whole is not None and float(whole.norm()) > 0, name
            assert float((gradient - whole).norm()) < tolerance * float(whole.norm()), name


def test_only_a_chunks_activations_are_held_at_once(tokenizer: Tokenizer) -> None:
    most = []
    for chunk in (0, 4):
        model = tiny("conv", tokenizer, chunk=chunk)
        alive: list[weakref.ref[Tensor]] = []
        peak = [0]

        def note(
            _: object,
            __: object,
            out: Tensor,
            alive: list[weakref.ref[Tensor]] = alive,
            peak: list[int] = peak,
        ) -> None:
            alive.append(weakref.ref(out))
            peak[0] = max(
                peak[0], sum(held.numel() for each in alive if (held := each()) is not None)
            )

        for module in model.image.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(note)
        model.loss(to_pixels(images(32), 16), tokenizer(TEXTS * 4)).backward()
        most.append(peak[0])
    assert most[1] < most[0] / 4


@pytest.mark.parametrize("tower", TOWERS)
def test_one_batch_is_learnt_by_heart(tower: Tower, tokenizer: Tokenizer) -> None:
    model, pixels, ids = tiny(tower, tokenizer), to_pixels(images(8), 16), tokenizer(TEXTS)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model.loss(pixels, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.5 and losses[-1] < 0.1
    scores = model.encode_image(pixels) @ model.encode_text(ids).T
    assert scores.argmax(1).tolist() == list(range(8))


@pytest.mark.parametrize("tower", TOWERS)
def test_embeddings_are_unit_vectors(tower: Tower, tokenizer: Tokenizer) -> None:
    model = tiny(tower, tokenizer)
    for vectors in (
        clip.embed_images(model, images(5, 20)),
        clip.embed_texts(model, tokenizer, TEXTS),
    ):
        assert vectors.dtype == torch.float32 and vectors.shape[1] == 16
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_logit_scale_is_clamped_from_above_only(tokenizer: Tokenizer) -> None:
    model = tiny("conv", tokenizer)
    for value, expected in ((9.0, LOGIT_SCALE_MAX), (-1.0, -1.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(expected)
    assert pytest.approx(100) == torch.tensor(LOGIT_SCALE_MAX).exp().item()


@pytest.mark.parametrize("tower", TOWERS)
def test_a_written_model_is_the_one_that_is_read(
    tower: Tower, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny(tower, tokenizer).eval()
    tokenizer.save(tmp_path / "tokenizer.json")
    averaged = {name: value + 0.01 for name, value in model.state_dict().items()}
    write_model("clip", model, averaged, model.config, tmp_path)
    found, found_tokenizer = clip.load(tmp_path)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    model.load_state_dict(averaged)  # the averaged weights are what is served
    assert clip.embed_images(found, images(3)).equal(clip.embed_images(model, images(3)))
    assert clip.embed_texts(found, found_tokenizer, TEXTS).equal(
        clip.embed_texts(model, tokenizer, TEXTS)
    )


def test_a_texts_embedding_depends_on_that_text_alone(tokenizer: Tokenizer) -> None:
    model = tiny("conv", tokenizer).eval()
    together = clip.embed_texts(model, tokenizer, TEXTS)
    alone = torch.cat([clip.embed_texts(model, tokenizer, [text]) for text in TEXTS])
    by_three = clip.embed_texts(model, tokenizer, TEXTS, batch=3)
    ids = tokenizer(TEXTS)
    padded = model.encode_text(
        torch.cat([ids, torch.full((len(ids), 16 - ids.shape[1]), PAD)], 1)
    ).detach()
    for other in (alone, by_three, padded):
        torch.testing.assert_close(other, together, atol=1e-5, rtol=0)
    assert float((together[0] - together[1]).norm()) > 0.01
    assert clip.embed_texts(model, tokenizer, []).shape == (0, 16)


def test_loss_stays_in_float32_under_autocast() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(64, 16), dim=-1) for _ in range(2))
    scale = torch.tensor(LOGIT_SCALE_MAX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_loss(image, text, torch.arange(64), scale)
    torch.testing.assert_close(
        found, contrastive_loss(image, text, torch.arange(64), scale), rtol=1e-5, atol=0
    )


def test_pictures_are_scaled_to_minus_one_to_one_and_resized_by_area() -> None:
    picture = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    picture[:, :2, :2] = 255
    x = to_pixels(picture, 2)
    assert x.shape == (1, 3, 2, 2)
    assert x[0, 0].tolist() == [[1, -1], [-1, -1]]
