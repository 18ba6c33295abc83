"""Class lists: names that repeat."""

import torch

from tpt_fast.text.classes import Classes


class _Text:
    device = torch.device("cpu")

    def __init__(self, names):
        self.classnames = tuple(dict.fromkeys(names))


def test_gradients_of_names_that_repeat_are_summed_in_tables_that_grow_with_the_names():
    """One table with a row a name would have 3000 x 2000 entries."""
    generator = torch.Generator().manual_seed(0)
    names = [f"name {i}" for i in range(2999)] + ["often"] * 2000 + ["name 7"] * 20
    names = tuple(names[i] for i in torch.randperm(len(names), generator=generator))
    text = _Text(names)
    classes = Classes.of(names, text, torch.tensor(1.0), None)
    assert sum(each.numel() for each in classes.places) < 2 * 16 * len(names)
    images = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    grad = torch.randn(1, 3, len(names), generator=generator, dtype=torch.float64)
    features = torch.randn(len(text.classnames), 4, generator=generator, dtype=torch.float64).requires_grad_()
    (want,) = torch.autograd.grad((classes.logits(images, features) * grad).sum(), features)
    got = classes.grad_features(images, grad)[0]
    # Sums of up to 3 x 2000 products of numbers below 5, whatever the order.
    assert (got - want).abs().max() <= 6000 * 25 * torch.finfo(torch.float64).eps
