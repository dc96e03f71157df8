"""What is sent to the device arrives as it was; what is kept there is kept once and can be trained with."""

import torch

from training.base.transfer import constant, packed, positions, send, views

CPU = torch.device("cpu")


def test_tensors_of_any_dtype_and_shape_are_packed_and_seen_again() -> None:
    sent = [
        torch.randn(3, 5),
        torch.randn(2, 1, 7, dtype=torch.float64),
        torch.arange(3),
        torch.zeros(0),
        torch.ones(()),
    ]
    sent += [torch.ones(()), torch.randn(4, 6).t(), torch.tensor([True, False, True]), torch.randn(3).bfloat16()]
    found = views(packed(sent), sent)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, sent, strict=True))
    whole = packed(sent)
    assert all(one.untyped_storage().data_ptr() == whole.data_ptr() for one in views(whole, sent))


def test_on_the_cpu_nothing_is_copied() -> None:
    sent = [torch.randn(3), torch.arange(2)]
    assert all(one is other for one, other in zip(send(CPU, sent), sent, strict=True))


def test_constants_are_made_once_and_may_be_trained_with() -> None:
    with torch.inference_mode():
        kept = constant((0.1, 0.2), torch.float32, CPU)
        places = positions((2, 3), torch.long, CPU)
    assert constant((0.1, 0.2), torch.float32, CPU) is kept
    weights = torch.ones(2, requires_grad=True)
    (weights * kept).sum().backward()
    assert torch.equal(weights.grad if weights.grad is not None else weights, torch.tensor([0.1, 0.2]))
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
