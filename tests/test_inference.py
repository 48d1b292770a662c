"""inference.py: what is asked for, how the answers are merged, and that both ways to ask agree."""
import numpy as np
import torch

from data import box_prompt, open_dataset
from inference import Predictor, ask, label_map, merge, predict_image
from readers.synapse import ORGANS
from texts import Texts

TEXT = dict(position="on the left", texture="bright", shape="round")


def test_the_most_certain_answer_wins():
    logits = torch.full((3, 4, 4), -1.0)
    logits[0, 0], logits[1, 0, 0], logits[2, 3] = 2.0, 3.0, 0.5
    label = label_map(["right kidney", "liver", "pancreas"], logits, (4, 4), ORGANS)
    assert label[0].tolist() == [5, 2, 2, 2] and label[3].tolist() == [8] * 4 and not label[1:3].any()
    assert label_map(["right kidney", "liver", "pancreas"], logits, (9, 6), ORGANS).shape == (9, 6)
    assert not label_map([], torch.zeros(0, 4, 4), (5, 5), ORGANS).any()


def test_prompts_ask_for_what_is_there_and_do_not_depend_on_order(small):
    dataset, texts = open_dataset("demo", split="test", image_size=64, limit=4), Texts("demo")
    features = [small.encode_image(torch.from_numpy(s.image).permute(2, 0, 1)[None]) for s in dataset]
    asks = lambda i, prompt, seed=0: ask(small, features[i], dataset[i], texts, prompt, 3, seed)
    for prompt in ("none", "point", "box"):
        forward = [asks(i, prompt) for i in range(4)]
        for i in reversed(range(4)):
            asked, logits = asks(i, prompt)
            present = [t for t, mask in zip(dataset[i].targets, dataset[i].masks) if mask.any()]
            assert set(asked) == set(ORGANS) if prompt == "none" else asked == present
            assert logits.shape == (len(asked), 64, 64)
            assert torch.equal(logits, forward[i][1])
    assert not torch.equal(asks(0, "point")[1], asks(0, "point", seed=1)[1])


def test_answers_are_those_of_the_evaluation(model):
    """The same image, texts and boxes give the same masks through predict_image as through Predictor."""
    model = model[0]
    dataset, texts = open_dataset("demo", split="test", image_size=64, limit=3), Texts("demo")
    for sample in dataset:
        names, logits = Predictor(model, texts, "box")(sample)
        boxes = np.stack([box_prompt(m) for m in sample.masks if m.any()])
        answer = predict_image(model, sample.image, [texts(n, "ct") for n in names], boxes)
        np.testing.assert_allclose(answer.probability, logits.sigmoid().numpy(), atol=1e-3)  # its features are kept in 16 bits
        again = predict_image(model, sample.image, [texts(n, "ct") for n in names], boxes,
                                      features=answer.features)
        assert np.array_equal(again.probability, answer.probability)


def test_prompts_are_in_pixels_of_the_image(model, monkeypatch):
    """On a 128 x 192 image of a 64 x 64 model: a pixel's centre stays the centre of what it covers."""
    seen = {}
    monkeypatch.setattr(type(model[0]), "ask", lambda self, x, points, boxes, masks=None: seen.update(
        points=points, boxes=boxes) or (torch.zeros(len(x), 32, 32), torch.zeros(len(x))))
    image = np.zeros((128, 192, 3), np.uint8)
    answer = predict_image(model[0], image, [TEXT], [[0, 0, 191, 127]], (np.array([[[95.5, 63.5]]]), [[1]]))
    assert seen["points"][0].tolist() == [[[31.5, 31.5]]] and seen["points"][1].tolist() == [[1]]
    np.testing.assert_allclose(seen["boxes"].numpy(), [[-1 / 3, -0.25, 63 + 1 / 3, 63.25]], atol=1e-5)
    assert answer.probability.shape == (1, 128, 192) and (answer.probability == 0.5).all()


def test_the_most_probable_target_wins():
    p = np.array([[[0.6, 0.2]], [[0.9, 0.4]]], np.float32)
    assert merge(p).tolist() == [[2, 0]]
