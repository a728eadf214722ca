"""Log-probabilities out of logits, and masked reductions, against loops."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robustgrad.objectives import sequence_log_probs, sequence_mean, sequence_sum, token_log_probs


def model_output(n: int = 4, length: int = 6, vocabulary: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, length, vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (n, length), generator=generator)
    mask = torch.rand(n, length, generator=generator) < 0.6
    return logits, tokens, mask


@pytest.mark.parametrize("average", [False, True])
def test_against_a_loop(average: bool) -> None:
    logits, tokens, mask = model_output()
    expected = []
    for i in range(len(tokens)):
        terms = [
            logits[i, t - 1].double().softmax(-1)[tokens[i, t]].log() for t in range(1, tokens.shape[1]) if mask[i, t]
        ]
        expected.append(sum(terms) / (len(terms) if average else 1))
    got = sequence_log_probs(logits, tokens, mask, average=average)
    assert_close(got, torch.stack(expected).float())


def test_gradients_against_differences() -> None:
    logits, tokens, mask = model_output(2, 4, 3)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_log_probs(x, tokens, mask), [logits])
    assert torch.autograd.gradgradcheck(lambda x: sequence_log_probs(x, tokens, mask), [logits])


def test_padding_may_hold_anything() -> None:
    values = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    means = sequence_mean(values, mask)
    means.sum().backward()
    assert_close(means, torch.tensor([1.0, 2.0]))
    assert_close(values.grad, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_a_sequence_without_tokens_is_zero() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert sequence_sum(torch.ones(1, 3), nothing) == sequence_mean(torch.ones(1, 3), nothing) == 0


def test_half_precision_is_widened_first() -> None:
    logits, tokens, mask = model_output()
    got = sequence_log_probs(logits.bfloat16(), tokens, mask)
    assert got.dtype == torch.float32
    assert_close(got, sequence_log_probs(logits.bfloat16().float(), tokens, mask))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.zeros(4, 5).long()}, ValueError, "logits must have shape (n, T, V) for tokens (n, T)"),
        ({"logits": torch.zeros(4, 6)}, ValueError, "unshifted"),
        ({"tokens": torch.zeros(4, 6)}, TypeError, "tokens must be a tensor of integer ids, got torch.float32"),
        ({"mask": torch.ones(4, 6)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(4, 5).bool()}, ValueError, "mask must have the shape of tokens (4, 6), got (4, 5)"),
        ({"logits": torch.zeros(4, 6, 5).long()}, TypeError, "logits must be float16"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("logits", "tokens", "mask"), model_output(), strict=True)) | change
    with pytest.raises(error, match=re.escape(message)):
        sequence_log_probs(**arguments)


def test_token_log_probs_normalise() -> None:
    logits, tokens, _ = model_output()
    every = [token_log_probs(logits, torch.full_like(tokens, token)).exp() for token in range(5)]
    assert_close(sum(every), torch.ones(4, 5))
